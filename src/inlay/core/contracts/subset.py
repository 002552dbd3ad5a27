"""The third contract: chosen parameters of the base, trained as a difference.

    θ' = θ + d        d starts at zero, so the base's own values are never written

A difference changes the layer for every row, so a batch that mixes it with other adapters is refused. Training d
instead of θ keeps the base bit-identical, makes switching exact and free, and stores only what was learnt; a sparse
method (FISH mask, LT-SFT) stores d at its chosen entries only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Difference(nn.Module, ABC):
    """What is added to one parameter. Abstract."""

    @abstractmethod
    def apply_to(self, value: Tensor) -> Tensor:
        """The parameter that the model computes with: `value` plus the difference, in its shape and dtype."""


class DenseDifference(Difference):
    """A difference at every entry of the parameter."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.difference = nn.Parameter(torch.zeros(like.shape, dtype=dtype, device=like.device))

    def apply_to(self, value: Tensor) -> Tensor:
        return (value + self.difference).to(value.dtype)


class SummedDifference(Difference):
    """A weighted sum of several differences to one parameter; each is stored with its own piece."""

    def __init__(self, parts: Sequence[tuple[float, Difference]]) -> None:
        super().__init__()
        self.parts = tuple(parts)  # a tuple, not a ModuleList: the modules belong to their pieces

    def apply_to(self, value: Tensor) -> Tensor:
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        total = wide
        for weight, part in self.parts:
            total = total + weight * (part.apply_to(wide) - wide)
        return total.to(value.dtype)
