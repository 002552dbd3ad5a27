from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.cli.merge import base_tensors, check_unused, write_merged
from inlay.core.errors import OutputError

IDS = torch.tensor([[3, 4, 5, 6]])


class Tokenizer:
    """Stands in for one: all that merging asks is that it can be written."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def adapted() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)).eval()
    adapter = inlay.attach(model, inlay.LoRA(rank=2), name="tuned")
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_a_merged_folder_stands_alone(adapted: Any, tmp_path: Path) -> None:
    with inlay.use(adapted, None):
        bare = logits(adapted)
    tuned = logits(adapted)
    inlay.merge(adapted, "tuned")
    write_merged(adapted, Tokenizer(), tmp_path / "new" / "merged")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "merged")
    assert torch.allclose(logits(fresh), tuned, atol=1e-5) and not torch.allclose(tuned, bare, atol=1e-2)
    assert sorted(os.listdir(tmp_path / "new")) == ["merged"]
    assert "tokenizer.json" in os.listdir(tmp_path / "new" / "merged")


def test_only_the_base_is_written(adapted: Any) -> None:
    names = set(base_tensors(adapted))
    inlay.merge(adapted, "tuned")
    inlay.unmerge(adapted)
    inlay.detach(adapted, "tuned")
    assert names == set(adapted.state_dict())


def test_a_folder_in_use_is_refused(adapted: Any, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(OutputError, match="already in use"):
            write_merged(adapted, Tokenizer(), taken)
    assert (tmp_path / "note.txt").read_text() == "mine" and os.listdir(tmp_path) == ["note.txt"]
    (tmp_path / "empty").mkdir()
    check_unused(tmp_path / "empty")


def test_nothing_is_left_of_a_write_that_fails(adapted: Any, tmp_path: Path) -> None:
    class Full(Tokenizer):
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="the disk is full"):
        write_merged(adapted, Full(), tmp_path / "merged")
    assert os.listdir(tmp_path) == []
