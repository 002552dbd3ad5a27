"""Bases: what is found, and one clear message for what is not a base."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.core.errors import ConfigError
from inlay.machine.precision import dtype_of
from inlay.train import load_base
from inlay.train.loading import collapse, precision_for
from tests import tiny


def test_a_base_with_all_its_weights(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = load_base(llama)
    assert base.fresh == () and type(base.model).__name__ == "LlamaForCausalLM"
    assert capfd.readouterr() == ("", "")
    assert load_base(llama, dtype=torch.bfloat16).model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def narrow(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("narrow")
    base = load_base(llama, precision="bf16")
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("half", [None, "bf16", "fp16"])
def test_the_precision_is_the_devices(llama: Path, narrow: Path, half: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inlay.train.loading.half_of", lambda device: half)
    expected = dtype_of(half or "fp32")
    assert load_base(narrow).model.dtype == expected and precision_for(narrow).precision == (half or "fp32")
    assert load_base(llama).model.dtype == torch.float32  # as it is stored
    assert load_base(narrow, precision="stored").model.dtype == torch.bfloat16
    assert load_base(narrow, precision="fp16").model.dtype == torch.float16
    assert load_base(llama, precision="fp16", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    packed = load_base(llama, quantize="int8").model
    assert {p.dtype for p in packed.parameters() if p.dtype != torch.int8} == {expected}


def test_a_type_that_only_the_weights_tell(narrow: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(narrow, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    assert load_base(folder, precision="stored").model.dtype == torch.bfloat16


def test_no_such_precision(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"precision 'bf61' is unknown; did you mean 'bf16'\?"):
        load_base(llama, precision="bf61")  # type: ignore[arg-type]


def test_fresh_heads_are_found(llama: Path, bert: Path) -> None:
    assert load_base(bert, task="classification", label_names=["a", "b", "c"]).fresh == ("classifier",)
    loaded = load_base(llama, task="classification", label_names=["a", "b", "c"])
    assert loaded.fresh == ("score",)
    assert loaded.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert load_base(bert, task="regression").model.config.num_labels == 1


def test_a_head_for_other_labels_is_fresh(bert: Path, tmp_path: Path) -> None:
    first = load_base(bert, task="classification", label_names=["a", "b"])
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    assert load_base(tmp_path, task="classification", label_names=["a", "b"]).fresh == ()
    assert load_base(tmp_path, task="classification", label_names=["b", "a"]).fresh == ("classifier",)
    assert load_base(tmp_path, task="classification", label_names=["a", "b", "c"]).fresh == ("classifier",)


def test_collapse_takes_the_largest_module_that_is_missing_whole() -> None:
    names = ["trunk.a.weight", "trunk.b.weight", "head.dense.weight", "head.dense.bias", "head.out.weight"]
    assert collapse(set(names[2:]), names) == ("head",)
    assert collapse({"head.dense.weight", "head.dense.bias"}, names) == ("head.dense",)
    assert collapse(set(), names) == ()


def test_what_is_no_base(llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(llama, copy)
    (copy / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(ConfigError, match=r"has a config\.json but no weights"):
        load_base(copy)
    (copy / "model.safetensors").write_bytes((tmp_path / "weights").read_bytes()[:5000])
    with pytest.raises(ConfigError, match="damaged or truncated"):
        load_base(copy)
    (copy / "model.safetensors").write_bytes((tmp_path / "weights").read_bytes())
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_base(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_base(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match="is not a model folder"):
        load_base(copy)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter"):
        load_base(copy)
    with pytest.raises(ConfigError, match="is a file"):
        load_base(llama / "config.json")
    with pytest.raises(ConfigError, match="no such folder"):
        load_base("./nowhere")
    with pytest.raises(ConfigError, match="local cache"):
        load_base("nobody/no-such-model")


def test_weights_that_are_not_all_there(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "base"
    shutil.copytree(llama, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(copy)
    with pytest.raises(ConfigError, match="lacks weights"):
        load_base(copy, task="classification", label_names=["a", "b"])


def test_tasks_that_a_base_cannot_do(bert: Path, t5: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot do the task seq2seq: it can do .*classification"):
        load_base(bert, task="seq2seq")
    with pytest.raises(ConfigError, match="cannot do the task causal"):
        load_base(t5, task="causal")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "base")
    bigger = tiny.tokenizer()
    bigger.add_tokens([f"new{i}" for i in range(50)])
    bigger.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 320
    with pytest.raises(ConfigError, match="do not belong together"):
        load_base(folder)
