"""The naive twin of every kernel, in float32 and with autograd, and the difference between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels.gpu import gated, labelled_loss, low_rank, norm, philox

# Relative to the norm of the twin's result: kernels round to the tensors' dtype once, at the end.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SEED = 2**40 + 12345


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the tensors on which kernels are tried; `scored` rows have logits over the vocabulary."""

    rows: int
    features: int
    rank: int
    vocabulary: int
    scored: int = 8
    share: float = 0.05

    def drawn(self, *shape: int, like: Tensor, seed: int = 0) -> Tensor:
        """Normal numbers with `like`'s dtype and device, the same on every device."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(like)


def differences(sizes: Sizes, device: torch.device | str, dtype: torch.dtype) -> dict[str, float]:
    """Kernel → |kernel − twin| / |twin|, the largest over its outputs."""
    like = torch.empty((), device=device, dtype=dtype)
    tried: dict[str, Callable[[Sizes, Tensor], Iterator[tuple[Tensor, Tensor]]]] = {
        "low_rank": _low_rank, "labelled_head": _labelled_head, "gated": _gated, "norm": _norm,
    }  # fmt: skip
    return {name: max(_apart(*pair) for pair in pairs(sizes, like)) for name, pairs in tried.items()}


def _apart(found: Tensor, expected: Tensor) -> float:
    """The relative difference; infinite if a value is NaN."""
    share = float((found.float() - expected.float()).norm().detach() / expected.float().norm().detach())
    return share if share == share else float("inf")


def _low_rank(sizes: Sizes, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    x = sizes.drawn(sizes.rows, sizes.features, like=like)
    a = sizes.drawn(sizes.rank, sizes.features, like=like, seed=1)
    low = sizes.drawn(sizes.rows, sizes.rank, like=like, seed=2)
    mask = philox.kept(sizes.rows, sizes.features, SEED, sizes.share, x.device)
    yield low_rank.narrowed(x, a, SEED, sizes.share), (x * mask).float() @ a.float().t()
    yield low_rank.gradient_of_a(low, x, SEED, sizes.share), low.float().t() @ (x * mask).float()
    yield low_rank.gradient_of_x(low, a, SEED, sizes.share), (low.float() @ a.float()) * mask


def _labelled_head(sizes: Sizes, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    labels = torch.randint(sizes.vocabulary, (sizes.scored,), generator=torch.Generator().manual_seed(3)).to(
        like.device
    )
    for factor, cap in ((1.0, None), (0.5, None), (1.0, 2.0), (3.0, 4.0)):
        scores = sizes.drawn(sizes.scored, sizes.vocabulary, like=like, seed=4) * 4
        wide = scores.float().requires_grad_()
        shaped = wide * factor if cap is None else torch.tanh(wide * factor / cap) * cap
        expected = F.cross_entropy(shaped, labels, reduction="none")
        expected.sum().backward()
        assert wide.grad is not None
        untouched = scores.clone()
        yield labelled_loss.cross_entropy_(untouched, labels, factor, cap, writes=False), expected.detach()
        yield untouched, wide.detach()
        yield labelled_loss.cross_entropy_(scores, labels, factor, cap, writes=True), expected.detach()
        yield scores, wide.grad


def _gated(sizes: Sizes, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    gate, up, grad = (sizes.drawn(sizes.rows, sizes.features, like=like, seed=s) for s in (5, 6, 7))
    for name, function in gated.KNOWN.items():
        g, u = gate.float().requires_grad_(), up.float().requires_grad_()
        expected = torch.autograd.grad(function(g) * u, (g, u), grad.float())
        yield from zip(gated.backward(grad, gate, up, name), expected, strict=True)


def _norm(sizes: Sizes, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    x, grad = (sizes.drawn(sizes.rows, sizes.features, like=like, seed=s) for s in (8, 9))
    weight = sizes.drawn(sizes.features, like=like, seed=10)
    for offset in (0.0, 1.0):
        wide = x.float().requires_grad_()
        out = (weight.float() + offset) * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-2)
        (expected,) = torch.autograd.grad(out, wide, grad.float())
        yield norm.gradient(grad, x, weight, 1e-2, offset), expected
