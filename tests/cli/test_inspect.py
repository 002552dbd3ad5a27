from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.cli.inspect import describe, inspect
from inlay.core.errors import AdapterFileError


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    inlay.attach(model, inlay.LoRA(rank=2), name="poems", where=["q_proj"], layers=[1])
    folder = tmp_path_factory.mktemp("adapter")
    inlay.save(model, "poems", folder)
    return folder


def test_facts(stored: Path) -> None:
    facts = describe(stored)
    assert (facts["name"], facts["method"], facts["where"], facts["layers"]) == (
        "poems",
        "lora",
        ["q_proj"],
        [1],
    )
    assert facts["hyper_parameters"]["rank"] == 2
    # One square matrix of 32: 2 · 32 · 2.
    assert facts["parameters"] == 128 and facts["types"] == ["F32"]
    assert facts["bytes"] == (stored / "adapter.safetensors").stat().st_size


def test_json_and_table(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(stored, as_json=True)
    assert json.loads(capsys.readouterr().out) == describe(stored)
    inspect(stored, tensors=True)
    shown = capsys.readouterr().out
    assert "poems" in shown and "lora" in shown and "2 × 32" in shown


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"no adapter.safetensors"):
        describe(tmp_path)
