"""Adapter names that are also names of torch's methods."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import inlay
from inlay.testing.models import ZOO


@pytest.mark.parametrize("name", ["half", "train", "type", "keys", "inlay", "0"])
def test_any_well_formed_name(name: str, tmp_path: Path) -> None:
    specimen = ZOO["llama"]
    model = specimen.build()
    batch = specimen.batch(rows=2, seed=0)
    adapter = inlay.attach(model, inlay.LoRA(rank=2), name=name)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    expected = specimen.logits(model(**batch))
    twin = copy.deepcopy(model)
    assert torch.equal(specimen.logits(twin(**batch)), expected)
    twin.load_state_dict(model.state_dict())
    assert model.half().train().eval().float() is model
    inlay.save(model, name, tmp_path)
    inlay.detach(model, name)
    assert set(model.state_dict()) == set(specimen.build().state_dict())
    inlay.load(model, tmp_path)
    assert set(inlay.adapters(model)) == {name}
