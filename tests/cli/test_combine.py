from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay

Command = Callable[..., tuple[int, str, str]]
Make = Callable[..., Path]


@pytest.fixture
def adapters(make_adapter: Make) -> tuple[Path, Path]:
    return make_adapter(inlay.LoRA(rank=2), seed=1, separator=" => "), make_adapter(inlay.LoRA(rank=3), seed=2)


def test_a_sum_is_written_and_evaluated(command: Command, base: Path, adapters: Any, tmp_path: Path) -> None:
    first, second = adapters
    words = ("combine", "--base", base, "--adapter", f"{first}=0.7", "--adapter", f"{second}=-0.3")
    code, out, err = command(*words, "--out", tmp_path / "sum", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["how"] == "concatenate" and found["worst"] == 0
    assert found["adapters"] == {str(first): 0.7, str(second): -0.3}
    assert {site["rank"] for site in found["sites"].values()} == {5}
    assert not (tmp_path / "sum" / "training.json").exists()  # only one has a record, so none speaks for both
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        for folder, name in ((first, "a"), (second, "b"), (tmp_path / "sum", "sum")):
            inlay.load(model, folder, name=name)
        piece = {n: inlay.adapters(model)[n].pieces[0].delta for n in ("a", "b", "sum")}  # type: ignore[union-attr]
        zero = torch.zeros(32, 32)
        weights = {n: d.weight(zero, None)[0] for n, d in piece.items()}
        model(input_ids=ids)
    assert torch.allclose(weights["sum"], 0.7 * weights["a"] - 0.3 * weights["b"], atol=1e-6)


def test_the_record_goes_along_where_trainings_agree(command: Command, make_adapter: Make, tmp_path: Path) -> None:
    folders = [make_adapter(inlay.LoRA(rank=2), seed=s, separator=" => ") for s in (1, 2)]
    words = [word for folder in folders for word in ("--adapter", folder)]
    code, out, err = command("combine", *words, "--out", tmp_path / "sum", "--how", "ties", "--rank", 4)
    assert code == 0, err
    assert "worst relative error" in out and "lora by ties" in out
    assert json.loads((tmp_path / "sum" / "training.json").read_text())["separator"] == " => "


def test_mistakes_are_said(command: Command, base: Path, adapters: Any, tmp_path: Path) -> None:
    first, _ = adapters
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    for words, told in {
        ("--adapter", f"{first}=x", "--out", tmp_path / "new"): "is not a number",
        ("--adapter", first, "--adapter", f"{first}=2", "--out", tmp_path / "new"): "given twice",
        ("--adapter", first, "--out", tmp_path / "used"): "already in use",
        ("--adapter", first, "--out", tmp_path / "new", "--how", "tied"): "did you mean 'ties'",
        ("--adapter", first, "--out", tmp_path / "new", "--how", "ties", "--density", "2"): "density is 2",
    }.items():
        code, out, err = command("combine", "--base", base, *words)
        assert code == 2 and out == "" and told in err and "Traceback" not in err
    assert not (tmp_path / "new").exists()
