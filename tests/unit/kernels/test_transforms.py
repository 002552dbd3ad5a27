"""Under `torch.func` and forward differentiation an attached model is its naive twin, and nothing of it is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import inlay
from inlay import LoRA
from inlay.core.forward.transforms import transformed
from inlay.testing.models import ZOO
from tests.golden.hand import shake

METHODS: dict[str, Any] = {
    "lora": LoRA(rank=2, alpha=2.0),  # of the others' size: four times as much makes 10 % of bfloat16's rounding
    "dora": inlay.DoRA(rank=2),
    "oft": inlay.OFT(block_size=4),
    "prefix-tuning": inlay.PrefixTuning(length=3),
    "prompt-tuning": inlay.PromptTuning(length=3),
}


def net() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A small net, what is trained in it, and inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double().eval()
    shake(inlay.attach(model, LoRA(rank=2), where=["0", "3"]))
    return model, trained(model), torch.randn(5, 4, dtype=torch.float64)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_of_each_row() -> None:
    model, values, x = net()

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, values, (x,))
        return out.square().sum()

    found = vmap(grad(loss), (None, 0))(values, x)
    for row, entering in enumerate(x):
        model.zero_grad()
        model(entering).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in values:
                torch.testing.assert_close(found[name][row], parameter.grad)


def test_forward_differentiation() -> None:
    model, _, x = net()
    along = torch.randn_like(x)
    _, expected = torch.autograd.functional.jvp(model, x, along)
    torch.testing.assert_close(jvp(model, (x,), (along,))[1], expected)
    with forward_ad.dual_level():
        assert transformed()
        out = model(forward_ad.make_dual(x, along))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected)
    assert not transformed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", METHODS)
def test_gradients_of_a_model(key: str, dtype: torch.dtype) -> None:
    """Norms, gates, attention and updates, while dropouts drop nothing.

    In bfloat16 the two round at other places, by processor, so both are held against the gradient in float64.
    """
    specimen = ZOO["llama"]
    model = specimen.build(dtype=dtype)
    batch = {name: t for name, t in specimen.batch(2, 0).items() if name != "labels"}
    shake(inlay.attach(model, METHODS[key]))
    model.train()

    def loss(values: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(model, values, (), batch).logits.float()
        return out.square().mean()

    found = grad(loss)(trained(model))
    usual = usual_gradients(model, batch)
    assert found.keys() == usual.keys()
    if dtype == torch.float32:
        for name, gradient in usual.items():
            assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm())
        return
    exact = usual_gradients(copy.deepcopy(model).double(), batch)
    for gradients in (found, usual):
        apart = sum(float((gradients[name] - exact[name]).square().sum()) for name in exact)
        assert apart**0.5 <= 5e-2 * sum(float(value.square().sum()) for value in exact.values()) ** 0.5


def usual_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is trained → its gradient, by autograd."""
    model.zero_grad()
    logits = model(**batch).logits
    logits.to(torch.promote_types(logits.dtype, torch.float32)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("key", METHODS)
def test_nothing_is_kept_of_what_many_adapters_computed_at_once(key: str) -> None:
    specimen = ZOO["llama"]
    model = specimen.build()
    batch = {name: t for name, t in specimen.batch(2, 0).items() if name != "labels"}
    shake(inlay.attach(model, METHODS[key]))
    values = trained(model)
    with torch.no_grad():
        before = model(**batch).logits + 0
        both = {name: torch.stack([value, 2 * value]) for name, value in values.items()}
        found = vmap(lambda values: functional_call(model, values, (), batch).logits)(both)
        torch.testing.assert_close(found[0], before, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(**batch).logits, before)
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.mul_(2)
        torch.testing.assert_close(found[1], model(**batch).logits, atol=1e-4, rtol=1e-4)


def test_a_loss_at_labels() -> None:
    specimen = ZOO["llama"]
    model = specimen.build().double()
    shake(inlay.attach(model, LoRA(rank=2), where="all-linear"))
    batch, values = specimen.batch(2, 0), trained(model)
    model(**batch).loss.backward()  # the short way is known by now
    found = grad(lambda values: functional_call(model, values, (), batch).loss)(values)
    for name, parameter in model.named_parameters():
        if name in values:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)  # both score in float32
