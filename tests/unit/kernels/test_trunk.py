"""A cut stack gives what the whole one gives, bit for bit, in scores and gradients; what cannot be cut is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay.core.errors import UnsupportedError
from inlay.kernels import trunk
from inlay.testing.models import ZOO

STACKS = [name for name, specimen in ZOO.items() if specimen.kind in ("decoder", "encoder")]


def attached(name: str, method: Any = None, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    specimen = ZOO[name]
    model = specimen.build()
    torch.manual_seed(0)
    adapter = inlay.attach(model, method or inlay.LoRA(rank=2), **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.use_cache = False
    return model, adapter, specimen.batch(3, 1, ragged=True)


def step(model: Any, adapter: Any, batch: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    for parameter in adapter.parameters():
        parameter.grad = None
    out = model(**batch)
    out.loss.backward()
    return out, [p.grad.clone() for p in adapter.parameters()]


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("training", [False, True])
def test_a_cut_stack_is_the_whole_one(name: str, training: bool) -> None:
    model, adapter, batch = attached(name, layers=[1])
    model.train(training)
    expected, gradients = step(model, adapter, batch)
    cut = trunk.find_cut(model, adapter, batch)
    assert (cut.depth, cut.total, model.training) == (1, 2, training)
    trunk.open_cut(model, cut)
    states = trunk.states_of(model, cut, batch, training=training)
    noise = torch.zeros_like(states)
    with trunk.replaying(cut, states):
        ours, own = step(model, adapter, batch)
    assert torch.equal(ours.loss, expected.loss) and torch.equal(ours.logits + 0, expected.logits + 0)
    assert all(torch.equal(a, b) for a, b in zip(own, gradients, strict=True))
    with trunk.replaying(cut, noise):  # the blocks below are passed over indeed
        assert not torch.equal(model(**batch).loss, expected.loss)
    trunk.close_cut(model, cut)
    with trunk.replaying(cut, noise):
        assert torch.equal(model(**batch).loss, expected.loss)


def test_depth_follows_the_lowest_piece() -> None:
    model, adapter, batch = attached("bert", inlay.TopLayers(top=1))
    assert trunk.find_cut(model, adapter, batch).depth == 1
    model, adapter, batch = attached("llama-classifier", inlay.LoRA(), layers=[1], modules_to_save=["score"])
    assert trunk.find_cut(model, adapter, batch).depth == 1
    model, adapter, batch = attached("bert", inlay.NormTuning(), where=["encoder.layer.1.output.LayerNorm"])
    assert trunk.find_cut(model, adapter, batch).depth == 1
    model, adapter, batch = attached("bert", inlay.LadderSideTuning())
    with pytest.raises(UnsupportedError, match="lowest layer"):
        trunk.find_cut(model, adapter, batch)


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("llama", inlay.LoRA(), "lowest layer"),
        ("llama", inlay.PrefixTuning(length=2), "prompt"),
        ("t5", inlay.LoRA(), "two stacks"),
        ("llama", inlay.TrainableTokens(tokens=(3,)), "lowest layer"),
    ],
)
def test_what_cannot_be_cut_is_refused(name: str, method: Any, words: str) -> None:
    model, adapter, batch = attached(name, method)
    with pytest.raises(UnsupportedError, match=words):
        trunk.find_cut(model, adapter, batch)


def test_random_parts_below_the_cut_are_named() -> None:
    model, adapter, batch = attached("bert", layers=[1])
    cut = trunk.find_cut(model, adapter, batch)
    assert trunk.random_parts(model, cut) == []
    model.get_submodule("bert.encoder.layer.0.output.dropout").p = 0.1
    model.get_submodule("bert.encoder.layer.1.output.dropout").p = 0.1
    assert trunk.random_parts(model, cut) == ["bert.encoder.layer.0.output.dropout"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "bloom"])
def test_a_kept_cache_is_never_left_with_holes(name: str) -> None:
    """Where the model keeps keys and values, blocks compute as ever, however the cache is passed to them."""
    model, adapter, batch = attached(name, layers=[1])
    cut = trunk.find_cut(model, adapter, batch)
    trunk.open_cut(model, cut)
    states = trunk.states_of(model, cut, batch)
    with torch.no_grad(), trunk.replaying(cut, torch.zeros_like(states)):
        out = model(**{**batch, "use_cache": True})
    assert torch.equal(out.loss, model(**batch).loss)


def test_a_part_of_the_batch_is_computed() -> None:
    """As where the labelled head tries a few tokens of a batch whose states are being replayed."""
    model, adapter, batch = attached("llama", layers=[1])
    cut = trunk.find_cut(model, adapter, batch)
    trunk.open_cut(model, cut)
    states = trunk.states_of(model, cut, batch)
    part = {name: value[1:2, :5] for name, value in batch.items()}
    expected = model(**part).loss
    with trunk.replaying(cut, states):
        assert torch.equal(model(**part).loss, expected)
