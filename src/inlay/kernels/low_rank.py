"""A low-rank update added to a frozen layer's output, in place and with little stored for the backward pass.

    y += scale · drop(x) Aᵀ Bᵀ         x (n, in)   A (rank, in)   B (out, rank)   y (n, out)

    forward    low = drop(x) Aᵀ                       stored: x (the layer's own input), low
    backward   dlow = scale · dy B                    dB = scale · dyᵀ low     dA = dlowᵀ drop(x)
               dx   = drop(dlow A)                    dy is passed on unchanged

One product writes into y, only A and B are cast, and the dropped positions are drawn again from a seed instead of being
stored (`masks.py`). If the layer is a plain matrix W, its own product is computed here too: y = x Wᵀ and dx = dy W; the
update's share of dx is added by the product that computes it, not in a separate pass. The twins are `LowRank.post` in
`inlay.methods._low_rank` and the layer's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.forward.transforms import transformed
from inlay.core.upstream import is_view
from inlay.kernels import gpu, second_derivatives
from inlay.kernels.masks import MOST, drawn, fresh_seed, without, without_

PLAIN = (Tensor, torch.nn.Parameter)


def applies(x: Tensor, y: Tensor, dropout: float) -> bool:
    """Whether `add_low_rank` can compute this: not compiled, in autocast or sharded, and dropout only where masks
    exist.

    Meta tensors count as on the CPU, so that a plan counts what a step on the CPU allocates.
    """
    return type(y) is Tensor and _suits(x, y.dtype, dropout)


def applies_to_layer(x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> bool:
    """Whether `linear_with_low_rank` can compute this: gradients are needed, but none of the layer's own parameters."""
    return (
        torch.is_grad_enabled()
        and type(weight) in PLAIN
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and _suits(x, weight.dtype, dropout)
    )


def _suits(x: Tensor, dtype: torch.dtype, dropout: float) -> bool:
    return (
        not transformed()
        and type(x) in PLAIN
        and x.dtype == dtype
        and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        and dropout <= MOST
        and (dropout == 0 or x.device.type in ("cpu", "meta") or gpu.serves(x))
    )


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, *, owned: bool) -> Tensor:
    """y plus the update.

    Args:
        y: (…, out); overwritten if `owned` and not a view.
        x: (…, in), with y's dtype.
        a, b: in any dtype; their gradients have the same.
        dropout: probability with which an entry of x is dropped from the update.
        owned: whether nothing else uses y.
    """
    in_place = owned and y.is_contiguous() and not is_view(y)
    seed = fresh_seed() if dropout else 0
    if not torch.is_grad_enabled():
        return _sum(y, _low(x, a.to(x.dtype), seed, dropout), b.to(x.dtype), scale / (1 - dropout), in_place)
    made: Tensor = LowRankSum.apply(y, x, a, b, None, scale, dropout, seed, in_place)  # type: ignore[no-untyped-call]
    return made


def linear_with_low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float
) -> Tensor:
    """The output of a frozen linear layer plus the update.

    Args:
        x: (…, in).
        weight, bias: (out, in) and (out), with x's dtype.
        a, b, dropout: as in `add_low_rank`.
    """
    seed = fresh_seed() if dropout else 0
    made: Tensor = LowRankSum.apply(None, x, a, b, (weight, bias), scale, dropout, seed, True)  # type: ignore[no-untyped-call]
    return made


def _low(x: Tensor, a: Tensor, seed: int, dropout: float) -> Tensor:
    """drop(x) Aᵀ, (n, rank), unscaled; `a` must have x's dtype."""
    if dropout and gpu.serves(x):
        from inlay.kernels.gpu import low_rank as kernel

        return kernel.narrowed(x, a, seed, dropout)
    return (a @ _dropped(x, seed, dropout).reshape(-1, x.shape[-1]).t()).t()  # faster with the narrow matrix first


def _sum(y: Tensor, low: Tensor, b: Tensor, scale: float, in_place: bool) -> Tensor:
    """y + scale · low Bᵀ; `b` must have y's dtype."""
    flat = y.reshape(-1, y.shape[-1])
    if in_place:
        flat.addmm_(low, b.t(), alpha=scale)
        return y
    return torch.addmm(flat, low, b.t(), alpha=scale).reshape(y.shape)


class LowRankSum(torch.autograd.Function):
    """Described at the top of this file. `layer` is the weight and bias to compute y from; None if y is given."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor | None, x: Tensor, a: Tensor, b: Tensor, layer: tuple[Tensor, Tensor | None] | None,
        scale: float, dropout: float, seed: int, in_place: bool,
    ) -> Tensor:  # fmt: skip
        scale = scale / (1 - dropout)
        if layer is not None:
            y = F.linear(x, *layer)
        elif in_place:
            ctx.mark_dirty(y)
        assert y is not None
        low = _low(x, a.to(x.dtype), seed, dropout)
        # If A is frozen, x is not needed.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, low, a, b, layer and layer[0])
        ctx.scale, ctx.dropout, ctx.seed, ctx.shape = scale, dropout, seed, x.shape
        return _sum(y, low, b.to(x.dtype), scale, in_place)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0]
        if not grad.is_meta and torch.is_autocast_enabled(grad.device.type):  # the forward ran without autocast
            with torch.autocast(grad.device.type, enabled=False):
                return LowRankSum.backward(ctx, *grads)
        saved = ctx.saved_tensors
        weight = saved[-1]
        onward = grad if weight is None else None
        if torch.is_grad_enabled():
            return onward, *_with_graph(ctx, saved, grad), *[None] * 5
        flat = grad.reshape(-1, grad.shape[-1])  # (n, out)
        into = flat @ weight if weight is not None and ctx.needs_input_grad[1] else None
        gradients = _gradients_on_gpu if ctx.dropout and gpu.serves(flat) else _gradients
        found = gradients(ctx, saved, flat, into)
        return onward, *found, *[None] * 5


def _gradients(ctx: Any, saved: Any, flat: Tensor, into: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of x, A and B.

    Args:
        saved: the tensors that the forward saved; `ctx` returns them only once.
        flat: the gradient of y, (n, out).
        into: a tensor (n, in) to which the gradient of x is added in place.
    """
    x, low, a, b, _ = saved
    low_t = (b.to(flat.dtype).t() @ flat.t()).mul_(ctx.scale)  # (rank, n): faster with the narrow matrix first
    d_x = d_a = d_b = None
    dropped = drawn(ctx.shape.numel(), ctx.seed, ctx.dropout) if ctx.dropout else None
    if ctx.needs_input_grad[1]:
        wide = a.to(flat.dtype)
        if into is not None and dropped is None:
            d_x = into.addmm_(low_t.t(), wide).view(ctx.shape)
        else:
            d_x = (low_t.t() @ wide).reshape(ctx.shape)
            d_x = d_x if dropped is None else without_(d_x, dropped)
            d_x = d_x if into is None else d_x.add_(into.view(ctx.shape))
    if ctx.needs_input_grad[2]:
        seen = x if dropped is None else without(x, dropped)
        d_a = (low_t @ seen.reshape(-1, x.shape[-1])).to(a.dtype)
    if ctx.needs_input_grad[3]:
        d_b = (low.t() @ flat).mul_(ctx.scale).t().to(b.dtype)
    return d_x, d_a, d_b


def _with_graph(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, A and B for a backward pass that is itself differentiated."""
    x, _, a, b, weight = saved
    _, wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
    if ctx.dropout and gpu.serves(grad):
        second_derivatives.refuse("dropout in a fused low-rank update on a GPU", "set the method's dropout to 0")
    if x is None and wants_b:
        second_derivatives.refuse("a low-rank update whose A is frozen", "train A too")
    if x is None:  # the update is linear in x, so any value will do
        x = grad.new_zeros(ctx.shape).requires_grad_(wants_x)
    kept = without_(torch.ones_like(x).contiguous(), drawn(x.numel(), ctx.seed, ctx.dropout)) if ctx.dropout else None

    def update(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        seen = x if kept is None else x * kept
        made = F.linear(F.linear(seen, a.to(x.dtype)), b.to(x.dtype) * float(ctx.scale))
        return made if weight is None else F.linear(x, weight) + made

    return second_derivatives.gradients(update, (x, a, b), (wants_x, wants_a, wants_b), grad)


def _gradients_on_gpu(ctx: Any, saved: Any, flat: Tensor, into: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same on a GPU, where the products draw the mask themselves."""
    from inlay.kernels.gpu import low_rank as kernel

    x, low, a, b, _ = saved
    _, wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
    d_low = (flat @ b.to(flat.dtype)).mul_(ctx.scale)  # (n, rank)
    seed, share = ctx.seed, ctx.dropout
    d_x = kernel.gradient_of_x(d_low, a.to(flat.dtype), seed, share).reshape(ctx.shape) if wants_x else None
    if d_x is not None and into is not None:
        d_x.add_(into.view(ctx.shape))
    d_a = kernel.gradient_of_a(d_low, x, seed, share).to(a.dtype) if wants_a else None
    return d_x, d_a, (low.t() @ flat).mul_(ctx.scale).t().to(b.dtype) if wants_b else None


def _dropped(x: Tensor, seed: int, share: float) -> Tensor:
    return without(x, drawn(x.numel(), seed, share)) if share else x
