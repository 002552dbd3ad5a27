"""Differences behind hard-concrete gates (diff pruning; the gates are Louizos et al. 2018, arXiv:1712.01312).

z = min(1, max(0, s (r − l) + l)),  s = σ(log u − log(1 − u) + α),  u ~ U(0, 1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from inlay.authoring import DenseDifference
from inlay.methods._steps import Steps

LOW, HIGH = -1.5, 1.5  # l and r


def hard_concrete(alpha: Tensor, draw: bool) -> Tensor:
    """Gates between 0 and 1, many of them exactly 0 or 1."""
    if draw:
        u = torch.rand_like(alpha).clamp(1e-4, 1 - 1e-4)
        alpha = u.log() - (-u).log1p() + alpha
    return (torch.sigmoid(alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def closing_slope(alpha: Tensor) -> Tensor:
    """The gradient of the expected number of open gates, Σ σ(α − log(−l / r))."""
    chance = torch.sigmoid(alpha - math.log(-LOW / HIGH))
    return chance * (1 - chance)


class GatedDifference(DenseDifference):
    """A difference and its gates. A gate at ±∞ is open or closed for good, so no mask is needed for it."""

    steps: Steps

    def __init__(self, like: Tensor, start: float, structured: bool) -> None:
        super().__init__(like)
        self.gates = nn.Parameter(torch.full_like(self.difference, start))
        self.group = nn.Parameter(self.gates.new_full((1,), start)) if structured else None

    def apply_to(self, value: Tensor) -> Tensor:
        return (value + self.gated(self.training)).to(value.dtype)

    def gated(self, draw: bool) -> Tensor:
        """z ⊙ w."""
        found = hard_concrete(self.gates, draw) * self.difference
        return found if self.group is None else found * hard_concrete(self.group, draw)

    def alphas(self) -> list[nn.Parameter]:
        return [self.gates] if self.group is None else [self.gates, self.group]
