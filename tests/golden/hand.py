"""What the golden tests share: random values for an adapter, cotangents, comparisons.

Nothing here knows how inlay works: the adapters' numbers are read from `Adapter.parameters`, and the expected
outputs are made in each test on a bare model by plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay import Adapter
from inlay.testing.models import ZOO


def zoo_model(name: str) -> Any:
    """A fresh model of the zoo, in which an equation is computed a second time.

    T5 does not scale its attention's scores, so random queries and keys multiply a float32's rounding a thousand
    times, by processor more or less; in float64 nothing of it is left in the numbers that are compared.
    """
    return ZOO[name].build(dtype=torch.float64 if name == "t5" else torch.float32)


def shake(adapter: Adapter, size: float = 0.3) -> Adapter:
    """Random values in every parameter, so that no zero or one of an initialisation hides a fault."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return adapter


def numbers(adapter: Adapter) -> dict[str, Tensor]:
    """Stored name → leaf copy that requires gradients."""
    return {name: t.detach().clone().requires_grad_() for name, t in adapter.tensors().items()}


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """Stored name → gradient; every parameter must have got one. What is stored but not trained has none."""
    by_address = {p.data_ptr(): p for p in adapter.parameters()}
    found = {}
    for name, tensor in adapter.tensors().items():
        if tensor.data_ptr() not in by_address:
            continue
        gradient = by_address[tensor.data_ptr()].grad
        assert gradient is not None, f"{name} got no gradient"
        found[name] = gradient
    return found


def inputs(name: str, *, rows: int = 3, ragged: bool = False, side: str = "right") -> dict[str, Tensor]:
    """A batch without labels; a decoder's input where the model is an encoder–decoder."""
    batch = ZOO[name].batch(rows, 3, ragged, side)  # type: ignore[arg-type]
    labels = batch.pop("labels", None)
    if ZOO[name].kind == "seq2seq":
        assert labels is not None
        batch["decoder_input_ids"] = labels.clamp(min=0)
    return batch


def cotangent(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(11)).to(like.dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to within `tolerance` of the expected tensor's size (at least 1)."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    assert torch.isfinite(expected).all()
    error = float((actual - expected).abs().max())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), error


def agree(
    adapter: Adapter,
    actual: Tensor,
    expected: Tensor,
    leaves: Mapping[str, Tensor],
    *,
    tolerance: float = 1e-5,
) -> None:
    """Same outputs, and the same gradient for every number of the adapter."""
    close(actual, expected, tolerance)
    weights = cotangent(actual)
    for parameter in adapter.parameters():
        parameter.grad = None
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, gradient in gradients(adapter).items():
        wanted = leaves[name].grad
        assert wanted is not None, f"the hand-made model does not use {name}"
        close(gradient, wanted, 10 * tolerance)


def with_weights(model: nn.Module, change: Callable[[str, Tensor], Tensor], batch: Mapping[str, Tensor]) -> Any:
    """The bare model's output with each parameter replaced by `change(name, value)`."""
    changed = {name: change(name, value.detach()) for name, value in model.named_parameters()}
    return torch.func.functional_call(model, changed, (), dict(batch))
