"""A base is the same base in every precision, and another one is not; also where float16 rounds twice."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.core.errors import BaseMismatchError
from inlay.core.model.fingerprint import Fingerprint, fingerprint

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored(dtype: torch.dtype) -> Any:
    """A checkpoint in a type, with weights as small as float16 has no digits for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=1e-3, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
    return model.to(dtype)


@pytest.mark.parametrize("file", TYPES[:2])
@pytest.mark.parametrize("one", TYPES)
@pytest.mark.parametrize("other", TYPES)
def test_one_checkpoint_in_any_precision(file: torch.dtype, one: torch.dtype, other: torch.dtype) -> None:
    base = stored(file)
    first, second = (fingerprint(copy.deepcopy(base).to(dtype)) for dtype in (one, other))
    assert first.differences(second) == second.differences(first) == []
    if torch.float16 not in (one, other):
        assert first == second  # so digests alone decide
    else:
        assert one == other or first.matrices != second.matrices  # or this test would show nothing


@pytest.mark.parametrize("one", TYPES)
@pytest.mark.parametrize("other", TYPES)
@pytest.mark.parametrize("changed", ["weight matrices", "norms"])
def test_another_checkpoint_is_told_apart(one: torch.dtype, other: torch.dtype, changed: str) -> None:
    """Fine-tuned by half a percent of each weight, less than a step of bfloat16."""
    base = stored(torch.float32)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ("norm" in name) == (changed == "norms") and "embed" not in name:
                parameter.mul_(1 + 5e-3 * torch.randn_like(parameter))
    found = fingerprint(base.to(one)).differences(fingerprint(tuned.to(other)))
    assert len(found) == 1 and changed in found[0]


def test_what_earlier_versions_wrote_is_compared_by_its_digests() -> None:
    base = stored(torch.float32)
    whole, half = fingerprint(base), fingerprint(copy.deepcopy(base).half())
    early = Fingerprint.from_dict({k: v for k, v in whole.to_dict().items() if k != "samples"})
    assert early.samples is None and early.differences(whole) == whole.differences(early) == []
    assert early.differences(half)  # they cannot be told from another base's
    for samples in ("fp16", "fp16 x y", "fp16 AAAA", "fp16 AAAA AAAA", "bf16 ! !", ""):
        assert replace(half, samples=samples).differences(whole)


@pytest.mark.parametrize("format", ["native", "peft"])
@pytest.mark.parametrize("trained", TYPES)
def test_adapters_go_from_one_machine_to_another(format: str, trained: torch.dtype, tmp_path: Path) -> None:
    """Trained where the base computes in one type, loaded where it computes in another: the same numbers."""
    model = stored(torch.bfloat16).to(trained)
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1)
    inlay.save(model, "default", tmp_path, format=format)
    file = next(tmp_path.glob("*.safetensors"))
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    for dtype in TYPES:
        loaded = inlay.load(stored(torch.bfloat16).to(dtype), tmp_path)
        assert loaded.digest == adapter.digest, f"from {trained} to {dtype}"


def test_another_base_is_refused_in_float16(tmp_path: Path) -> None:
    inlay.attach(base := stored(torch.bfloat16), inlay.LoRA(rank=2))
    inlay.save(base, "default", tmp_path)
    other = stored(torch.bfloat16)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(BaseMismatchError, match="weight matrices"):
        inlay.load(other.half(), tmp_path)
    assert inlay.load(stored(torch.bfloat16).half(), tmp_path).name == "default"


def test_samples_are_few(tmp_path: Path) -> None:
    assert len(json.dumps(fingerprint(stored(torch.float32)).to_dict())) < 4096
