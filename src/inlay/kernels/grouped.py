"""Stacked forms of the usual deltas: each class computes many deltas of one kind, one for each segment.

    LowRanks       y + x Aᵀ Bᵀ             A (segments, rank, in), B (segments, rank, out), scales in B
    Scales         y ∘ s, or x ∘ s before the layer
    Offsets        y + d
    Bottlenecks    y + f(z Dᵀ + c) Uᵀ + b      z is x or y

Smaller ranks are padded with zeros, which change nothing. On a CPU in half precision, a decoding step spends more time
on the overhead of each small product than on computing it, so few tokens are multiplied in float32. The stacks stay in
half precision, because reading them is the other half of the cost. The twins are the deltas' own `post`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.core.contracts.delta import Grouped
from inlay.core.model.site import Site

FEW = 8  # up to so many tokens per segment, float32 products are faster


def stacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors stacked along a new leading dimension, detached; smaller ones are padded with zeros."""
    shapes = {t.shape for t in tensors}
    if len(shapes) == 1:
        return torch.stack([t.detach() for t in tensors]).to(dtype)
    made = tensors[0].new_zeros(len(tensors), *(max(sizes) for sizes in zip(*shapes, strict=True)), dtype=dtype)
    for number, tensor in enumerate(tensors):
        at: Any = (number, *(slice(size) for size in tensor.shape))
        made[at] = tensor.detach()
    return made


def product(x: Tensor, right: Tensor) -> Tensor:
    """(segments, n, k) times (segments, k, m); in float32 if that is faster."""
    if few(x):
        return torch.bmm(x.float(), right.float())
    if right.shape[2] < x.shape[1]:  # with the narrow matrix first it is faster by a third
        return torch.bmm(right.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(x, right)


def few(x: Tensor) -> bool:
    """Whether there are so few tokens that half precision is slower on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and x.shape[1] <= FEW


class LowRanks(Grouped):
    """Low-rank updates.

    Args:
        a: (rank, in) each; b: (out, rank) each; scales: one each.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> None:
        self.a = stacked(a, dtype).transpose(1, 2)  # (segments, in, rank)
        self.b = stacked([t.detach().t() * s for t, s in zip(b, scales, strict=True)], dtype)  # (segments, rank, out)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        low = product(x, self.a)
        if few(x):
            return y.add_(torch.bmm(low, self.b.float()))
        return y.baddbmm_(low, self.b)

    post_into = post


class EnteringScales(Grouped):
    """Rescale the input; scales are (in) each."""

    def __init__(self, scales: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.scale = stacked(scales, dtype)[:, None]  # (segments, 1, in)

    def pre(self, x: Tensor) -> Tensor:
        return x * self.scale


class LeavingScales(Grouped):
    """Rescale the output; scales are (out) each."""

    def __init__(self, scales: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.scale = stacked(scales, dtype)[:, None]  # (segments, 1, out)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y.mul_(self.scale)

    post_into = post


class Offsets(Grouped):
    """Add offsets to the output; they are (out) each."""

    def __init__(self, offsets: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.offset = stacked(offsets, dtype)[:, None]  # (segments, 1, out)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y.add_(self.offset)

    post_into = post


class Bottlenecks(Grouped):
    """Two projections with a nonlinearity between them.

    Args:
        down, down_bias, up, up_bias: (size, in), (size), (out, size), (out) each.
        function: the nonlinearity of all; zero at zero, so that padding adds nothing.
        beside: whether the adapters read the layer's input (else its output).
    """

    def __init__(
        self, down: Sequence[Tensor], down_bias: Sequence[Tensor], up: Sequence[Tensor], up_bias: Sequence[Tensor],
        scales: Sequence[float], function: Callable[[Tensor], Tensor], dtype: torch.dtype, *, beside: bool,
    ) -> None:  # fmt: skip
        self.down = stacked(down, dtype).transpose(1, 2)  # (segments, in, size)
        self.down_bias = stacked(down_bias, dtype)[:, None]  # (segments, 1, size)
        self.up = stacked([t.detach().t() * s for t, s in zip(up, scales, strict=True)], dtype)  # (segments, size, out)
        self.up_bias = stacked([t.detach() * s for t, s in zip(up_bias, scales, strict=True)], dtype)[:, None]
        self.function, self.beside = function, beside

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        inner = self.function(product(x if self.beside else y, self.down).add_(self.down_bias))
        return y.add_(product(inner, self.up) if not few(y) else torch.bmm(inner, self.up.float())).add_(self.up_bias)

    post_into = post


class Turned(Grouped):
    """DoRA: (y − bias + x Aᵀ Bᵀ) ∘ g + bias, with g = m / ‖W + s B A‖ computed when the stacks are made.

    Args:
        gains: g, (out) each.
        bias: the layer's bias, or None.
    """

    reads_base = True

    def __init__(self, update: LowRanks, gains: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        self.update, self.gain = update, stacked(gains, dtype)[:, None]  # (segments, 1, out)
        self.rest = None if bias is None else (bias.detach() * (1 - self.gain)).to(dtype)  # (segments, 1, out)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        turned = self.update.post(x, y, site).mul_(self.gain)
        return turned if self.rest is None else turned.add_(self.rest)

    post_into = post
