"""A forward that somebody puts on a module of an attached model: it stays, and everything is computed once."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import LoRA
from inlay.testing.models import ZOO

LLAMA = ZOO["llama"]


@pytest.fixture
def model() -> Any:
    return LLAMA.build()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return LLAMA.batch(rows=2, seed=0)


def adapted(model: Any, name: str = "default") -> None:
    torch.manual_seed(0)
    adapter = inlay.attach(model, LoRA(rank=2), where="all-linear", name=name)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1)


def times(forward: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if isinstance(out, Tensor):
            return out * factor
        out.loss = out.loss * factor
        return out

    return wrapper


def test_wrappers_of_the_model_stand_around_one_another(model: Any, batch: dict[str, Tensor]) -> None:
    adapted(model)
    once = model(**batch).loss
    model.forward = times(model.forward, 2)
    model.forward = types.MethodType(times(model.forward.__func__, 3), model)  # as accelerate does
    torch.testing.assert_close(model(**batch).loss, 6 * once)
    torch.testing.assert_close(copy.deepcopy(model)(**batch).loss, 6 * once)
    inlay.attach(model, LoRA(rank=1), name="other")
    with inlay.use(model, "default"):
        torch.testing.assert_close(model(**batch).loss, 6 * once)
    inlay.detach(model, "other")
    inlay.detach(model, "default")
    torch.testing.assert_close(model(**batch).loss, 6 * LLAMA.build()(**batch).loss)


def test_the_models_own_forward_put_back(model: Any, batch: dict[str, Tensor]) -> None:
    adapted(model)
    own, once = model.forward, model(**batch).loss
    model.forward = times(own, 2)
    model.forward = own
    torch.testing.assert_close(model(**batch).loss, once)
    inlay.detach(model, "default")
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("before", [False, True], ids=["around inlay", "around inlay and an earlier one"])
def test_a_layers_wrapper_outlives_attaching_and_detaching(model: Any, batch: dict[str, Tensor], before: bool) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    if before:
        layer.forward = times(layer.forward, 0.5)
    adapted(model)
    layer.forward = times(layer.forward, 2)
    expected = model(**batch).logits
    adapted(model, "other")
    with inlay.use(model, "default"):
        torch.testing.assert_close(model(**batch).logits, expected)
    inlay.detach(model, "other")
    torch.testing.assert_close(model(**batch).logits, expected)
    inlay.detach(model, "default")
    plain = LLAMA.build()
    plain.model.layers[0].self_attn.q_proj.weight.data *= 1 if before else 2
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    adapted(model)  # now around the layer as it is
    adapted(plain)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


def test_a_layers_own_forward_runs_once_whatever_is_attached(model: Any, batch: dict[str, Tensor]) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    given = layer.forward = times(layer.forward, 0.5)
    adapted(model)
    expected = model(**batch).logits
    for name in ("second", "third"):
        adapted(model, name)
        torch.testing.assert_close(model(**batch).logits, expected)
    for name in ("third", "default", "second"):
        inlay.detach(model, name)
    assert layer.forward is given
    plain = LLAMA.build()
    plain.model.layers[0].self_attn.q_proj.weight.data *= 0.5
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


def test_accelerates_hooks_put_on_and_taken_off(model: Any, batch: dict[str, Tensor]) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    adapted(model)
    expected = model(**batch).logits
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        add_hook_to_module(layer, ModelHook())
    torch.testing.assert_close(model(**batch).logits, expected)
    inlay.detach(model, "default")
    plain = LLAMA.build()(**batch).logits
    torch.testing.assert_close(model(**batch).logits, plain)
    adapted(model)
    torch.testing.assert_close(model(**batch).logits, expected)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(**batch).logits, expected)
    inlay.detach(model, "default")
    assert not any("forward" in m.__dict__ for m in model.modules())
    torch.testing.assert_close(model(**batch).logits, plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_mixed_precision_by_accelerate(name: str, accelerator_state: None) -> None:
    """Logits within what bfloat16 rounds: 1e-4 of their variance, T5's 3e-3; the adapter changes 0.5 and more."""
    from accelerate import Accelerator

    specimen = ZOO[name]
    model: Any = specimen.build()
    batch = specimen.batch(rows=2, seed=0)
    adapted(model)
    expected = model(**batch)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    out = prepared(**batch)
    apart = (specimen.logits(out).float() - specimen.logits(expected)).square().mean()
    assert apart < 5e-3 * specimen.logits(expected).var()
    out.loss.backward()
    assert all(p.grad is not None for p in inlay.adapters(model)["default"].parameters())


# Modules in which we have something to say by other means than a forward of ours, and position tables of both kinds.
PLACES = [
    ("llama", "model", LoRA(rank=2), "attention"),
    ("llama", "model.layers.0", LoRA(rank=2), "attention"),
    ("llama", "model.layers.1.mlp.down_proj", inlay.TopLayers(top=1), None),
    ("gpt2", "transformer.wpe", inlay.PrefixTuning(length=3), None),
    ("opt", "model.decoder.embed_positions", inlay.PrefixTuning(length=3), None),
]


@pytest.mark.parametrize("before", [False, True], ids=["put later", "own"])
@pytest.mark.parametrize(("name", "path", "method", "where"), PLACES, ids=[path for _, path, *_ in PLACES])
@torch.no_grad()
def test_a_forward_runs_in_every_host(name: str, path: str, method: Any, where: Any, before: bool) -> None:
    specimen, called = ZOO[name], list[str]()
    batch = {k: v for k, v in specimen.batch(rows=2, seed=0).items() if k != "labels"}
    plain, model, expected = specimen.build(), specimen.build(), specimen.build()

    def attach(to: Any) -> None:
        for number in (0, 1):
            torch.manual_seed(number)
            adapter = inlay.attach(to, method, where=where, name=f"a{number}")
            for parameter in adapter.parameters():
                parameter.normal_(0, 0.1)

    def same(route: Any, other: Any) -> None:
        called.clear()
        with inlay.use(model, route):
            out = model(**batch).logits
        assert called == ["here"]
        torch.testing.assert_close(out, other(**batch).logits)

    def put() -> None:
        module = model.get_submodule(path)
        forward = module.forward
        module.forward = lambda *args, **kwargs: (called.append("here"), forward(*args, **kwargs))[1]

    if before:
        put()
    attach(model)
    if not before:
        put()
    attach(expected)
    for route in ("a0", "a1"):
        with inlay.use(expected, route):
            same(route, expected)
    inlay.detach(model, "a1")
    with inlay.use(expected, "a0"):
        same("a0", expected)
    inlay.detach(model, "a0")
    called.clear()
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    assert called == ["here"]
    held = {n: set(m.__dict__) ^ set(plain.get_submodule(n).__dict__) for n, m in model.named_modules()}
    assert {n: names for n, names in held.items() if names} == {path: {"forward"}}


def test_a_layers_hooks_taken_off_are_gone(model: Any, batch: dict[str, Tensor]) -> None:
    """Transformers wraps the forward of every class of layers again, ours too."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    adapted(model)
    expected = model(**batch).logits
    add_hook_to_module(model.model.layers[0], ModelHook())
    adapted(model, "other")
    with inlay.use(model, "default"):
        torch.testing.assert_close(model(**batch).logits, expected)
    remove_hook_from_module(model.model.layers[0])
    inlay.detach(model, "other")
    torch.testing.assert_close(model(**batch).logits, expected)
    inlay.detach(model, "default")
    torch.testing.assert_close(model(**batch).logits, LLAMA.build()(**batch).logits)
