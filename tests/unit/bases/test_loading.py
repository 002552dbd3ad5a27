"""Checkpoints that are not whole are refused in words, before a tensor is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.bases.loading import stored_tensors
from inlay.core.errors import ConfigError
from inlay.core.model.originals import INDEX


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "not an index"),
        ("[]", "not an index"),
        ("{}", "not an index"),
        (json.dumps({"weight_map": ["a"]}), "not an index"),
        (json.dumps({"weight_map": {"a": 1}}), "not an index"),
        ("[" * 100_000, "not an index"),
        (json.dumps({"weight_map": {"a": "model-00001.safetensors"}}), "lacks model-00001.safetensors"),
    ],
)
def test_a_broken_index(index: str, said: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ConfigError, match=said):
        stored_tensors(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x40" + bytes(7) + b"{}"])
def test_a_broken_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        stored_tensors(str(tmp_path))


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no safetensors files"):
        stored_tensors(str(tmp_path))


def test_a_whole_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    values: dict[str, Any] = {"a": torch.arange(6).view(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.empty(0, 2)}
    save_file(values, tmp_path / "model.safetensors")
    found = stored_tensors(str(tmp_path))
    assert set(found) == set(values)
    assert all(torch.equal(found[name][...], value) for name, value in values.items())
