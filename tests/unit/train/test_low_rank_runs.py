"""Whole runs with the relatives of LoRA that ask something of the run: groups, data, a drawn rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.core.errors import ConfigError
from inlay.train import RunConfig, load_base, run
from tests import tiny

METHODS: dict[str, dict[str, Any]] = {
    "lora-plus": {"rank": 2},
    "lora-fa": {"rank": 2},
    "pissa": {"rank": 2},
    "eva": {"rank": 2},
    "dylora": {"rank": 4, "frozen": True},
}


def config(data: Path, base: Path, out: Path, **changes: Any) -> RunConfig:
    small = {"steps": 4, "batch_size": 4, "eval_share": 0.2}
    return RunConfig.of({"data": str(data), "base": str(base), "out": str(out), **small, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_a_run_and_its_repetition(method: str, completions: Path, llama: Path, tmp_path: Path) -> None:
    options = {"method": method, "settings": METHODS[method]}
    first = run(config(completions, llama, tmp_path / "a", **options), progress=False)
    again = run(RunConfig.read(tmp_path / "a" / "run.yaml", out=str(tmp_path / "b")), progress=False)
    name = "adapter.safetensors"
    assert (first.adapter / name).read_bytes() == (again.adapter / name).read_bytes()
    lines = [json.loads(line) for line in (first.out / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in lines)
    model = load_base(llama).model
    adapter = inlay.load(model, first.adapter)
    if method == "dylora":
        assert int(adapter.tensors()["shared/drawn/steps"]) == 4
    if method == "eva":
        ranks = dict(adapter.method.rank_pattern)  # type: ignore[attr-defined]
        assert 0 < sum(ranks.values()) <= 2 * len(ranks)


def test_transformers_trainer_with_lora_plus(llama: Path, tmp_path: Path) -> None:
    """Its own optimizer has one rate and is refused; one made from the adapter's groups trains."""
    from transformers import Trainer, TrainingArguments

    model, tokenizer, _ = load_base(llama)
    adapter = inlay.attach(model, inlay.LoRAPlus(rank=2))
    ids = [tokenizer(row["text"])["input_ids"][:4] for row in tiny.rows("text", 8)]
    rows = [{"input_ids": i, "labels": i, "attention_mask": [1] * 4} for i in ids]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="parameter_groups"):
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    before = adapter.digest
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, constant)).train()
    assert adapter.digest != before
