"""Virtual tokens leave the form of a model's outputs: a tuple where the call or the configuration wants one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay.testing.models import ZOO


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("name", ["bert", "bert inside", "t5"])
def test_outputs_are_what_the_base_gives(name: str, configured: bool, asked: bool | None) -> None:
    kind = name.partition(" ")[0]
    whole: Any = ZOO[kind].build()
    model = whole.bert if name == "bert inside" else whole
    model.config.return_dict = configured
    batch = {n: t for n, t in ZOO[kind].batch(2, 0).items() if name != "bert inside" or n != "labels"}
    batch |= {} if asked is None else {"return_dict": asked}
    with torch.no_grad():
        expected = model(**batch)
        inlay.attach(model, inlay.PromptTuning(length=3, init="random"))
        found = model(**batch)
    assert type(found) is type(expected) and isinstance(found, tuple) == (not (configured if asked is None else asked))
    assert [getattr(t, "shape", None) for t in found[:2]] == [getattr(t, "shape", None) for t in expected[:2]]
