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
