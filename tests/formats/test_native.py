"""inlay's own file: a header that claims more than the file holds takes no memory."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import inlay
from inlay.cli.inspect import describe
from inlay.core.errors import AdapterFileError
from inlay.testing.models import ZOO

FILE = "adapter.safetensors"


def with_header(folder: Path, **method: Any) -> Path:
    """The stored adapter with other hyper-parameters."""
    with safe_open(folder / FILE, framework="pt") as file:
        header = json.loads(file.metadata()["inlay"])
    header["method"] |= method
    save_file(load_file(folder / FILE), folder / FILE, metadata={"inlay": json.dumps(header)})
    return folder


@pytest.mark.parametrize("rank", [10**8, 10**12, 10**30])
def test_a_header_that_claims_a_huge_rank(rank: int, tmp_path: Path) -> None:
    model = ZOO["llama"].build()
    inlay.attach(model, inlay.LoRA(rank=2))
    inlay.save(model, "default", tmp_path)
    model = ZOO["llama"].build()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterFileError):
        inlay.load(model, with_header(tmp_path, rank=rank))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 200 * 1024
    assert not inlay.adapters(model)


def tampered(folder: Path, entries: dict[str, Any], ours: dict[str, Any]) -> Path:
    """The stored adapter with other entries of its header: the file's, and those that inlay keeps in it."""
    raw = (folder / FILE).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["__metadata__"]["inlay"] = json.dumps(json.loads(header["__metadata__"]["inlay"]) | ours)
    text = json.dumps(header | entries).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return folder


NOT_HEADERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"x": 5}, {}),
    ({"x": {"data_offsets": [0]}}, {}),
    ({"x": {"dtype": "F32", "shape": [0], "data_offsets": ["a", "b"]}}, {}),
    ({"x": {"dtype": "F32", "data_offsets": [0, 0]}}, {}),
    ({"__metadata__": None}, {}),
    ({"__metadata__": {"inlay": 5}}, {}),
    ({"__metadata__": {"inlay": "[" * 100_000}}, {}),
    ({}, {"method": 5}),
    ({}, {"method": {}}),
    ({}, {"method": {"method": "nothing"}}),
    ({}, {"method": {"method": "lora", "rank": "many"}}),
    ({}, {"places": []}),
    ({}, {"base": 4}),
    ({}, {"base": {"structure": 5}}),
    ({}, {"digest": 7}),
]


def test_a_header_that_is_none(tmp_path: Path) -> None:
    """Loading and showing end in one error; never in a Python traceback."""
    model = ZOO["llama"].build()
    inlay.attach(model, inlay.LoRA(rank=2))
    inlay.save(model, "default", tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    model = ZOO["llama"].build()
    for entries, ours in NOT_HEADERS:
        (tmp_path / FILE).write_bytes(whole)
        tampered(tmp_path, entries, ours)
        with pytest.raises(AdapterFileError):
            inlay.load(model, tmp_path)
        with pytest.raises(AdapterFileError):
            describe(tmp_path)
    assert not inlay.adapters(model)
