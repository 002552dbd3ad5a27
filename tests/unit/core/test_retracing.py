"""A compiled model traces each route once: not again when it comes back, learns, or gets a neighbour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import inlay
from inlay import LoRA
from inlay.testing.models import ZOO

IDS = torch.arange(8).reshape(2, 4)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_routes_are_traced_once() -> None:
    model: Any = ZOO["llama"].build()
    for name in "ab":
        inlay.attach(model, LoRA(rank=2), name=name)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def traces_after(choice: Any) -> int:
        with torch.no_grad(), inlay.use(model, choice):
            made = compiled(input_ids=IDS, use_cache=False).logits
            torch.testing.assert_close(made, model(input_ids=IDS, use_cache=False).logits, rtol=1e-4, atol=1e-5)
        return counter.frame_count

    routes: list[Any] = ["a", "b", None, ["a", "b"]]
    assert [traces_after(r) for r in routes] == [1, 2, 3, 4]
    assert {traces_after(r) for r in routes} == {4}
    with torch.no_grad():
        for parameter in inlay.adapters(model)["a"].parameters():
            parameter.add_(0.1)
    assert {traces_after(r) for r in routes} == {4}
    inlay.attach(model, LoRA(rank=3), name="c")  # at the same places: no other module changes its class
    assert {traces_after(r) for r in routes} == {4}
    assert [traces_after("c"), traces_after("a")] == [5, 5]
