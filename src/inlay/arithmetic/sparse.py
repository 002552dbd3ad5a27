"""Sums with less interference: entries on which adapters of different tasks conflict are dropped before summing.

    τ_i             the change that adapter i makes, over all its places
    magnitude       Σ w_i trim(τ_i)                 trim keeps the share `density` with the largest magnitude
    dare            Σ w_i (m_i ∘ τ_i) / density     m_i ~ Bernoulli(density), seeded
    ties            γ = sign Σ w_i trim(τ_i);       mean of w_i trim(τ_i) over the adapters whose sign is γ
    dare-ties       the same with DARE's draw instead of trim

TIES: Yadav et al. 2023, arXiv:2306.01708, algorithm 1. As there, the share is taken over the whole adapter, not
matrix by matrix, and the mean counts only adapters that keep an entry and agree on its sign; the paper's λ is a common
weight. If the kept values cancel exactly, the sum is zero. DARE: Yu et al. 2023, arXiv:2311.03099, equation 1.

The changes are read one place after another, more than once, so that they are never all in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from inlay.core.errors import ConfigError

Sparse = Literal["magnitude", "dare", "ties", "dare-ties"]
SPARSE: tuple[Sparse, ...] = ("magnitude", "dare", "ties", "dare-ties")
Read = Callable[[str], Tensor]
"""Reads an adapter's change at a place, given the place's key."""

_HIGH, _LOW = 2**15, 2**16  # the magnitude bits of a float32: 15 high ones, 16 low ones


class Sparsifier:
    """Combines the changes of several adapters place by place.

    Args:
        reads: for each adapter, a function from a key to its change there.
        weights: one for each adapter.
        keys: keys of all places, in the order of the model.
        density: share of the entries to keep.
        seed: seed of DARE's draw; the same places in the same order give the same draw on every device.
    """

    def __init__(
        self,
        how: Sparse,
        reads: Sequence[Read],
        weights: Sequence[float],
        keys: Sequence[str],
        density: float,
        seed: int,
    ) -> None:
        if not 0 < density <= 1:
            raise ConfigError(f"density is {density}; expected a share above 0 and up to 1")
        self.how, self.reads, self.weights, self.density = how, reads, weights, density
        draws = how in ("dare", "dare-ties")
        self.thresholds = [0.0 if draws else threshold(read, keys, density) for read in reads]
        self.generators = [torch.Generator().manual_seed((seed + i * 2**32) % 2**63) for i in range(len(reads))]

    def __call__(self, key: str) -> Tensor:
        """The combined change at a place; call it once for each key, in order."""
        kept = [w * self._keep(i, self.reads[i](key)) for i, w in enumerate(self.weights)]
        total = torch.stack(kept).sum(0)
        if self.how in ("magnitude", "dare"):
            return total
        agreeing = torch.stack([(k.sign() == total.sign()) & (k != 0) for k in kept])
        return (torch.stack(kept) * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)

    def _keep(self, adapter: int, change: Tensor) -> Tensor:
        if self.how in ("dare", "dare-ties"):
            drawn = torch.rand(change.shape, generator=self.generators[adapter]).to(change.device)
            return change * (drawn < self.density) / self.density
        return change * (change.float().abs() >= self.thresholds[adapter])  # in float32, as in `threshold`


def threshold(read: Read, keys: Sequence[str], density: float) -> float:
    """The magnitude of the smallest entry to keep, if a share `density` of all entries is kept, at least one.

    Found exactly in two passes over the bits of the magnitudes, whose order is that of the magnitudes.
    """
    high, total = torch.zeros(_HIGH, dtype=torch.int64), 0
    for key in keys:
        bits = _bits(read(key))
        high += torch.bincount(bits >> 16, minlength=_HIGH).cpu()
        total += bits.numel()
    wanted = max(1, round(density * total))
    above = high.flip(0).cumsum(0)  # entries in this bin and those above it
    place = int((above < wanted).sum())
    bin_, left = _HIGH - 1 - place, wanted - (int(above[place - 1]) if place else 0)
    low = torch.zeros(_LOW, dtype=torch.int64)
    for key in keys:
        bits = _bits(read(key))
        low += torch.bincount(bits[bits >> 16 == bin_] & (_LOW - 1), minlength=_LOW).cpu()
    last = _LOW - 1 - int((low.flip(0).cumsum(0) < left).sum())
    return float(torch.tensor((bin_ << 16) | last, dtype=torch.int32).view(torch.float32))


def _bits(change: Tensor) -> Tensor:
    return change.float().abs().reshape(-1).contiguous().view(torch.int32).long()
