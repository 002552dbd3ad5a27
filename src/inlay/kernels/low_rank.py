"""A low-rank update added to what a frozen layer computed, in place and with little kept for the backward pass.

    y += scale · drop(x) Aᵀ Bᵀ         x (n, in)   A (rank, in)   B (out, rank)   y (n, out)

    forward    low = drop(x) Aᵀ                       kept: x (the layer's own input), low
    backward   dlow = scale · dy B                    dB = scale · dyᵀ low     dA = dlowᵀ drop(x)
               dx   = drop(dlow A)                    dy goes on unchanged

One product writes into y, casts are of A and B only, and the dropped positions are drawn again from a seed instead
of being kept (`masks.py`). Its twin is `LowRank.post` in `inlay.methods._low_rank`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import gpu, second
from inlay.kernels.masks import MOST, drawn, fresh_seed, without, without_


def applies(x: Tensor, y: Tensor, dropout: float) -> bool:
    """Whether `add_low_rank` computes this: not compiled, in autocast or sharded; masks where a kernel draws them.

    Of tensors without values (meta) it answers as for the CPU, so that a plan counts what a CPU's step allocates.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and type(y) is Tensor
        and x.dtype == y.dtype
        and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        and dropout <= MOST
        and (dropout == 0 or x.device.type in ("cpu", "meta") or gpu.serves(x))
    )


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, *, owned: bool) -> Tensor:
    """The sum.

    Args:
        y: (…, out); written where `owned` and no view of something else.
        x: (…, in), of y's dtype.
        a, b: in any dtype; gradients come back in it.
        dropout: share of x's entries left out of the update.
        owned: whether nobody else holds y.
    """
    in_place = owned and y.is_contiguous() and not y._is_view()
    seed = fresh_seed() if dropout else 0
    if not torch.is_grad_enabled():
        return _sum(y, _low(x, a.to(x.dtype), seed, dropout), b.to(x.dtype), scale / (1 - dropout), in_place)
    made: Tensor = LowRankSum.apply(y, x, a, b, scale, dropout, seed, in_place)  # type: ignore[no-untyped-call]
    return made


def _low(x: Tensor, a: Tensor, seed: int, dropout: float) -> Tensor:
    """drop(x) Aᵀ, (n, rank), unscaled, for a in x's dtype."""
    if dropout and gpu.serves(x):
        from inlay.kernels.gpu import low_rank as kernel

        return kernel.narrowed(x, a, seed, dropout)
    return (a @ _dropped(x, seed, dropout).reshape(-1, x.shape[-1]).t()).t()  # narrow matrices first are faster


def _sum(y: Tensor, low: Tensor, b: Tensor, scale: float, in_place: bool) -> Tensor:
    """y + scale · low Bᵀ, for b in y's dtype."""
    flat = y.reshape(-1, y.shape[-1])
    if in_place:
        flat.addmm_(low, b.t(), alpha=scale)
        return y
    return torch.addmm(flat, low, b.t(), alpha=scale).reshape(y.shape)


class LowRankSum(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, seed: int, in_place: bool
    ) -> Tensor:
        scale = scale / (1 - dropout)
        low = _low(x, a.to(x.dtype), seed, dropout)
        out = _sum(y, low, b.to(x.dtype), scale, in_place)
        if in_place:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, low, a, b)  # a frozen A needs no input
        ctx.scale, ctx.dropout, ctx.seed, ctx.shape = scale, dropout, seed, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, low, a, b = ctx.saved_tensors
        grad = grads[0]
        if torch.is_grad_enabled():
            return grad, *_with_graph(ctx, grad), None, None, None, None
        flat = grad.reshape(-1, grad.shape[-1])  # (n, out)
        if ctx.dropout and gpu.serves(flat):
            return grad, *_gradients_on_gpu(ctx, flat), None, None, None, None
        low_t = (b.to(flat.dtype).t() @ flat.t()).mul_(ctx.scale)  # (rank, n): narrow matrices first are faster
        d_x = d_a = d_b = None
        dropped = drawn(ctx.shape.numel(), ctx.seed, ctx.dropout) if ctx.dropout else None
        if ctx.needs_input_grad[1]:
            d_x = (low_t.t() @ a.to(flat.dtype)).reshape(ctx.shape)
            d_x = d_x if dropped is None else without_(d_x, dropped)
        if ctx.needs_input_grad[2]:
            seen = x if dropped is None else without(x, dropped)
            d_a = (low_t @ seen.reshape(-1, x.shape[-1])).to(a.dtype)
        if ctx.needs_input_grad[3]:
            d_b = (low.t() @ flat).mul_(ctx.scale).t().to(b.dtype)
        return grad, d_x, d_a, d_b, None, None, None, None


def _with_graph(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, A and B, for a backward pass that is differentiated itself."""
    x, _, a, b = ctx.saved_tensors
    _, wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
    if ctx.dropout and gpu.serves(grad):
        second.refuse("dropout in a fused low-rank update on a GPU", "set the method's dropout to 0")
    if x is None and wants_b:
        second.refuse("a low-rank update whose A is frozen", "train A, too")
    if x is None:  # the update is linear in it, so any will do
        x = grad.new_zeros(ctx.shape).requires_grad_(wants_x)
    kept = without_(torch.ones_like(x).contiguous(), drawn(x.numel(), ctx.seed, ctx.dropout)) if ctx.dropout else None

    def update(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        seen = x if kept is None else x * kept
        return F.linear(F.linear(seen, a.to(x.dtype)), b.to(x.dtype) * float(ctx.scale))

    return second.gradients(update, (x, a, b), (wants_x, wants_a, wants_b), grad)


def _gradients_on_gpu(ctx: Any, flat: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, A and B, with the mask drawn inside the products."""
    from inlay.kernels.gpu import low_rank as kernel

    x, low, a, b = ctx.saved_tensors
    _, wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
    d_low = (flat @ b.to(flat.dtype)).mul_(ctx.scale)  # (n, rank)
    seed, share = ctx.seed, ctx.dropout
    d_x = kernel.gradient_of_x(d_low, a.to(flat.dtype), seed, share).reshape(ctx.shape) if wants_x else None
    d_a = kernel.gradient_of_a(d_low, x, seed, share).to(a.dtype) if wants_a else None
    return d_x, d_a, (low.t() @ flat).mul_(ctx.scale).t().to(b.dtype) if wants_b else None


def _dropped(x: Tensor, seed: int, share: float) -> Tensor:
    return without(x, drawn(x.numel(), seed, share)) if share else x
