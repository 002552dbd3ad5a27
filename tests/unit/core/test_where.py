"""Places that are stored with an adapter are the ones that were chosen, and no others."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import inlay


class Nested(nn.Module):
    """Each layer's full name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner["proj"](self.proj(x))
        return made


def test_a_predicate_comes_back_as_the_layers_it_chose(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested()
    adapter = inlay.attach(model, inlay.LoRA(rank=2), where=lambda path, _: path == "proj")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    x = torch.randn(3, 4)
    expected = model(x)
    inlay.save(model, "default", tmp_path)
    inlay.detach(model, "default")
    assert not torch.equal(model(x), expected)
    loaded = inlay.load(model, tmp_path)
    assert loaded.digest == adapter.digest
    assert torch.equal(model(x), expected)


def test_an_adapter_tells_itself_in_three_lines() -> None:
    model = Nested()
    adapter = inlay.attach(model, inlay.LoRA(rank=300), name="poems", where=["proj"])
    first, places, size = repr(adapter).splitlines()
    assert first.startswith("Adapter 'poems': lora(rank=300, ") and first.endswith(")")
    assert places.split() == ["at", "2", "places", "(proj)"]
    assert size == f"  {adapter.count:,} trained parameters" and "," in size
    one = inlay.attach(model, inlay.LoRA(rank=2), where=lambda path, _: path == "proj")
    assert "\n  at 1 place (" in repr(one) and repr(one).count("\n") == 2
