"""Layers compiled one by one: the same numbers, one graph for all of them, and refused where that cannot be."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import inlay
from inlay.core.errors import UnsupportedError
from inlay.kernels import compiled
from inlay.kernels.compiled import blocks_of, compile_layers
from inlay.testing.models import ZOO


@pytest.fixture(autouse=True)
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Traces, and runs what was traced; no code is made."""
    torch._dynamo.reset()
    made = CompileCounter()
    monkeypatch.setattr(compiled, "BACKEND", made)
    yield made
    torch._dynamo.reset()


def deep(name: str, layers: int) -> Any:
    """A model of the zoo with more layers, all the same."""
    specimen = ZOO[name]
    model: Any = specimen.build()
    blocks = model.model.layers
    for _ in range(layers - len(blocks)):
        blocks.append(copy.deepcopy(blocks[0]))
    model.config.num_hidden_layers = layers
    return model.train()


def step(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    loss = model(**batch, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def moved(model: Any, method: Any, *, where: str | None = "all-linear") -> None:
    torch.manual_seed(0)
    adapter = inlay.attach(model, method, where=where)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_layers_share_their_graphs_whatever_the_batch(counter: CompileCounter) -> None:
    model = deep("llama", 4)
    moved(model, inlay.LoRA(rank=2))
    batches = [ZOO["llama"].batch(rows, seed, ragged=True) for rows, seed in ((2, 1), (4, 3))]
    expected = [step(model, batch) for batch in batches]
    undo = compile_layers(model)
    for batch, wanted in zip(batches, expected, strict=True):
        for one, other in zip(step(model, batch), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert counter.frame_count == 2  # the first layer's input needs no gradient
    with torch.no_grad():  # and evaluation is not compiled
        model(**batches[0], use_cache=False)
    assert counter.frame_count == 2
    undo()
    assert all(block._compiled_call_impl is None for block in blocks_of(model))


@pytest.mark.parametrize("method", [inlay.DoRA(rank=2), inlay.IA3(), inlay.Pfeiffer(reduction=4)], ids=lambda m: m.name)
def test_methods_share_them_too(method: Any, counter: CompileCounter) -> None:
    model = deep("llama", 4)
    moved(model, method, where=None)
    batch = ZOO["llama"].batch(2, 1)
    expected = step(model, batch)
    compile_layers(model)
    for one, other in zip(step(model, batch), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 2


def test_some_layers_only(counter: CompileCounter) -> None:
    model = deep("llama", 3)
    moved(model, inlay.LoRA(rank=2))
    compile_layers(model, first=1)
    step(model, ZOO["llama"].batch(2, 1))
    assert [block._compiled_call_impl is None for block in blocks_of(model)] == [True, False, False]
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_stacks(name: str) -> None:
    specimen = ZOO[name]
    model: Any = specimen.build()
    moved(model, inlay.LoRA(rank=2))
    batch = specimen.batch(2, 1)

    def found() -> list[Tensor]:
        loss = model(**batch).loss
        return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    expected = found()
    compile_layers(model)
    for one, other in zip(found(), expected, strict=True):
        # By the tensor's largest entry: in float64's light both are 1e-5 of it off, wherever entries are near zero.
        assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (inlay.PrefixTuning(length=2), "other keys and values in every layer"),
        (inlay.LoReFT(), "positions"),
        (inlay.LadderSideTuning(), "reads the input of one layer in another"),
    ],
    ids=lambda value: getattr(value, "name", "said"),
)
def test_what_no_graph_of_a_layer_can_serve_is_refused(method: Any, said: str) -> None:
    model: Any = ZOO["llama"].build()
    inlay.attach(model, method)
    with pytest.raises(UnsupportedError, match=said):
        compile_layers(model)
    assert all(block._compiled_call_impl is None for block in blocks_of(model))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="numbered layers"):
        compile_layers(torch.nn.Linear(2, 2))
