"""What the field says about big models comes out of the planner, on their real configurations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import inlay
from inlay.plan import Planner, Setting, Skeleton

sys.path.insert(0, str(Path(__file__).parent))
from configurations import config_of

GB, GIB = 10**9, 2**30


def test_seventy_billion_in_fp32_are_280_gb() -> None:
    plan = Planner(Skeleton(config_of("Llama-2-70B")), inlay.LoRA()).plan(Setting(precision="fp32"))
    assert 68 * GB < plan.base_parameters < 70 * GB
    assert plan.memory.weights == pytest.approx(280 * GB, rel=0.02)


def test_65_billion_train_with_qlora_within_48_gb() -> None:
    """QLoRA, arXiv:2305.14314: one GPU of 48 GB, rank 64 on all linears, batch 1, length 512, paged states aside."""
    setting = Setting(quantisation="nf4", checkpointing=True, batch=1, length=512)
    planner = Planner(Skeleton(config_of("LLaMA-65B")), inlay.LoRA(rank=64, alpha=16), where="all-linear")
    plan = planner.plan(setting)
    assert 33 * GB < plan.memory.weights < 36 * GB
    assert plan.memory.total < 48 * GB
    assert planner.plan(Setting(batch=1, length=512, checkpointing=True)).memory.total > 130 * GB


def test_13_billion_train_with_qlora_within_16_gb() -> None:
    setting = Setting(quantisation="nf4", checkpointing=True, batch=1, length=1024)
    plan = Planner(Skeleton(config_of("Llama-2-13B")), inlay.LoRA(rank=16), where="all-linear").plan(setting)
    assert plan.base_parameters > 13 * GB
    assert plan.memory.total < 16 * GB - 0.6 * GIB


def test_gpt3_lora_takes_a_third_of_full_fine_tuning() -> None:
    """LoRA, arXiv:2106.09685 §4.2: 350 GB instead of 1.2 TB, in half precision with Adam's states.

    Full fine-tuning here keeps float32 values, gradients and states beside the base, so it needs more than theirs did.
    """
    skeleton = Skeleton(config_of("GPT-3-175B"))
    setting = Setting(precision="fp16", checkpointing=True, batch=1, length=512)
    lora = Planner(skeleton, inlay.LoRA(rank=4), where=("query", "value")).plan(setting)
    assert lora.memory.total == pytest.approx(350 * GB, rel=0.08)
    assert 1 / 4 < lora.memory.total / (1.2e12) < 1 / 3
    full = Planner(skeleton, inlay.FullFineTuning()).plan(setting)
    assert full.memory.total > 3 * lora.memory.total and full.memory.optimizer == 8 * full.base_parameters


def test_gpt3_checkpoint_of_lora_is_35_mb() -> None:
    """In half precision, as the paper counts it; files here are float32."""
    skeleton = Skeleton(config_of("GPT-3-175B"))
    plan = Planner(skeleton, inlay.LoRA(rank=4), where=("query", "value")).plan(Setting(precision="fp16", length=8))
    assert plan.trainable == 18_874_368
    assert plan.disk_bytes / 2 == pytest.approx(35e6, rel=0.1)
