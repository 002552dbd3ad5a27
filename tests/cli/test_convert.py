from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import inlay
from inlay.train import read_record

IDS = torch.tensor([[3, 4, 5, 6]])


@torch.no_grad()
def logits(base: Path, folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    inlay.load(model, folder)
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("method", [inlay.LoRA(rank=2), inlay.IA3(), inlay.PrefixTuning(length=3, projection=4)])
def test_both_ways(method: Any, base: Path, make_adapter: Callable[..., Path], command: Any, tmp_path: Path) -> None:
    folder = make_adapter(method, kind="completion")
    code, out, err = command("convert", folder, tmp_path / "theirs", "--to", "peft", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["from"], facts["to"], facts["method"]) == ("native", "peft", method.name)
    assert (facts["left_out"] is None) == (method.name != "prefix-tuning")
    assert {f.name for f in (tmp_path / "theirs").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "training.json",
    }  # fmt: skip
    code, out, err = command("convert", tmp_path / "theirs", tmp_path / "ours", "--to", "native", "--json")
    assert code == 0, err
    assert json.loads(out)["from"] == "peft"
    record, before = read_record(tmp_path / "ours"), read_record(folder)
    assert record is not None and before is not None
    assert record == dataclasses.replace(before, base=f"./{base.name}"), "no file tells where the base lay"
    expected = logits(base, folder)
    assert (logits(base, tmp_path / "theirs") - expected).abs().max() < 1e-5
    assert (logits(base, tmp_path / "ours") - expected).abs().max() < 1e-5


def test_the_base_is_the_one_that_the_file_names(
    base: Path, make_adapter: Callable[..., Path], command: Any, tmp_path: Path
) -> None:
    """Without a record of training: PEFT's configuration says the base, and the given one goes before it."""
    folder = make_adapter(inlay.LoRA(rank=2))
    assert command("convert", folder, tmp_path / "theirs", "--to", "peft", "--base", base)[0] == 0
    config = tmp_path / "theirs" / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == str(base)
    assert command("convert", tmp_path / "theirs", tmp_path / "ours", "--to", "native")[0] == 0
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/nowhere/at-all"}))
    code, _, err = command("convert", tmp_path / "theirs", tmp_path / "again", "--to", "native")
    assert code == 2 and "/nowhere/at-all" in err
    assert command("convert", tmp_path / "theirs", tmp_path / "again", "--to", "native", "--base", base)[0] == 0


def test_a_file_of_loralib(base: Path, command: Any, tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A": torch.randn(2, 32), f"{path}.lora_B": torch.randn(32, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    words = ("convert", tmp_path / "lora.safetensors", tmp_path / "out", "--to", "peft", "--base", base)
    code, _, err = command(*words)
    assert code == 2 and "alpha" in err and not (tmp_path / "out").exists()
    assert command(*words, "--alpha", "4")[0] == 0
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(stored[f"base_model.model.{path}.lora_A.weight"], tensors[f"{path}.lora_A"])
    torch.save(tensors, tmp_path / "lora.pt")
    words = ("convert", tmp_path / "lora.pt", tmp_path / "second", "--to", "native", "--base", base, "--alpha", "4")
    code, _, err = command(*words)
    assert code == 2 and "--allow-pickle" in err
    assert command(*words, "--allow-pickle")[0] == 0


def test_what_cannot_be_converted(base: Path, make_adapter: Callable[..., Path], command: Any, tmp_path: Path) -> None:
    folder = make_adapter(inlay.Houlsby(bottleneck=2))
    out = tmp_path / "out"
    for words, said in (
        ((folder, out, "--to", "peft", "--base", base), "method 'houlsby' has no counterpart in PEFT's format"),
        ((folder, out, "--to", "native"), "in native format already"),
        ((folder, out, "--to", "onnx"), "--to is 'onnx'"),
        ((tmp_path / "absent", out, "--to", "peft"), "no such file or folder"),
        ((folder, tmp_path, "--to", "peft"), "already in use"),
    ):
        (tmp_path / "note.txt").write_text("mine")
        code, printed, err = command("convert", *words)
        assert code == 2 and said in err and printed == "", err
        assert "Traceback" not in err
    assert not out.exists() and (tmp_path / "note.txt").read_text() == "mine"


def test_a_classifier_without_a_record(command: Any, tmp_path: Path) -> None:
    """The head in the file says the task and the number of classes."""
    import peft
    from transformers import AutoModelForSequenceClassification

    from tests.tiny import bert

    place = str(bert(tmp_path / "base"))
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=4)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    assert command("convert", tmp_path / "theirs", tmp_path / "ours", "--to", "native")[0] == 0
    words = ("convert", tmp_path / "ours", tmp_path / "again", "--to", "peft", "--json")
    code, out, err = command(*words)
    assert code == 2 and "names the base './base', which is no folder here: give it with --base" in err
    code, out, err = command(*words, "--base", place)
    assert code == 0, err
    assert json.loads(out)["parameters"] == 2 * 2 * (16 + 16) + 4 * 16 + 4
    theirs, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert {n: t.tolist() for n, t in theirs.items()} == {n: t.tolist() for n, t in again.items()}


def test_a_head_that_nobody_has(command: Any, tmp_path: Path) -> None:
    """A native file says which base it belongs to, and a head that was drawn just now is nobody's."""
    from tests.tiny import bert

    path = "bert.encoder.layer.0.attention.self.query"
    save_file({f"{path}.lora_A": torch.randn(2, 16), f"{path}.lora_B": torch.randn(16, 2)}, tmp_path / "a.safetensors")
    words = ("convert", tmp_path / "a.safetensors", tmp_path / "out", "--base", bert(tmp_path / "base"), "--alpha", "2")
    code, _, err = command(*words, "--to", "native")
    assert code == 2 and "has weights for classifier" in err and not (tmp_path / "out").exists()
    assert command(*words, "--to", "peft")[0] == 0
