"""Sums that interfere less: what the adapters of different tasks write over each other is left out first.

    τ_i             the change that adapter i makes, all its places together
    magnitude       Σ w_i trim(τ_i)                 trim keeps the share `density` that is largest in size
    dare            Σ w_i (m_i ∘ τ_i) / density     m_i ~ Bernoulli(density), seeded
    ties            γ = sign Σ w_i trim(τ_i);       mean of w_i trim(τ_i) over the adapters whose sign is γ
    dare-ties       the same with DARE's draw in trim's place

TIES: Yadav et al. 2023, arXiv:2306.01708, algorithm 1. As there, the share is taken over the whole adapter and not
matrix by matrix, and the mean counts only adapters that keep an entry and agree on it; the paper's λ is a common
weight. Where the kept values cancel exactly, the sum is zero. DARE: Yu et al. 2023, arXiv:2311.03099, equation 1.

The changes are read one place after another, more than once, so that never all of them are in memory.
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
"""An adapter's change at a place, by the place's key."""

_HIGH, _LOW = 2**15, 2**16  # a float32's size in bits: 15 above, 16 below


class Sparsifier:
    """Combines the changes of several adapters place by place.

    Args:
        reads: for each adapter, its change at a key.
        weights: one an adapter.
        keys: of all places, in the order of the model.
        density: share of the entries that are kept.
        seed: of DARE's draw; the same places in the same order give the same draw on every device.
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
        """The combined change at a place; call once a key, in order."""
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
        return change * (change.float().abs() >= self.thresholds[adapter])  # as `threshold` saw them


def threshold(read: Read, keys: Sequence[str], density: float) -> float:
    """The size of the last entry that is kept when the largest `density` of all entries are; at least one is.

    Found exactly in two passes over the bits of the sizes, which are in the order of the sizes.
    """
    high, total = torch.zeros(_HIGH, dtype=torch.int64), 0
    for key in keys:
        bits = _bits(read(key))
        high += torch.bincount(bits >> 16, minlength=_HIGH).cpu()
        total += bits.numel()
    wanted = max(1, round(density * total))
    above = high.flip(0).cumsum(0)  # entries in this bin and the ones over it
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
