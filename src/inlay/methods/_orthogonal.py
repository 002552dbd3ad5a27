"""Shared by OFT and BOFT: skew matrices, their Cayley transform, and a layer whose input is rotated.

R = (I − Q)(I + Q)⁻¹,  Qᵀ = −Q          y = W Rᵀ x, that is x R as rows; W' = W Rᵀ
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from inlay.authoring import Delta, SelectionError, Site, problems, stamp, transformed, widened


class TurnedDelta(Delta):
    """A rotation of a whole layer's input. Abstract; subclasses hold the upper triangles as `skew`."""

    skew: Parameter
    kept: tuple[tuple[int, int, int], Tensor] | None = (
        None  # the last rotations made without a graph, and the stamp of `skew` then
    )

    @abstractmethod
    def blocks(self) -> Tensor:
        """The small rotation matrices, in the parameter's precision."""

    @abstractmethod
    def turn(self, x: Tensor, *, back: bool = False) -> Tensor:
        """``x R`` along the last dimension, or ``x Rᵀ``."""

    def rotations(self) -> Tensor:
        """`blocks`, computed again only when the parameter has changed: generation needs them for every token."""
        if torch.is_grad_enabled() or transformed():
            return self.blocks()
        which = stamp(self.skew)
        if self.kept is None or self.kept[0] != which:
            self.kept = (which, self.blocks())
        return self.kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}  # the copy's parameter is another tensor

    def pre(self, x: Tensor) -> Tensor:
        return self.turn(x)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn(weight, back=True), bias


class TurnedPart(TurnedDelta):
    """The same for a part of a fused layer, whose other parts get the input unchanged. Abstract."""

    pre = Delta.pre

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y + F.linear(self.turn(x) - x, site.read_weight()[0])


def skew_matrix(upper: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (..., size, size) from the rows of their upper triangles (..., size (size − 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    half = upper.new_zeros(*upper.shape[:-1], size, size)
    half[..., rows, columns] = upper
    return half - half.transpose(-1, -2)


def cayley(skew: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹, exact: orthogonal with determinant 1. The two factors commute."""
    skew = widened(skew)
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotation: Tensor = torch.linalg.solve(one + skew, one - skew)
    return rotation


def turn_blocks(x: Tensor, blocks: Tensor, *, back: bool = False) -> Tensor:
    """Each block of the last dimension times its matrix, or the matrix's transpose.

    Args:
        x: (..., blocks × size).
        blocks: (blocks, size, size), or (1, size, size) for the same matrix everywhere.
    """
    size = blocks.shape[-1]
    matrices = (blocks.transpose(-1, -2) if back else blocks).to(x.dtype)
    folded: Tensor = x.unflatten(-1, (-1, size))  # (..., blocks, size)
    if blocks.shape[0] == 1:
        return (folded @ matrices[0]).flatten(-2)
    return torch.einsum("...kb,kbc->...kc", folded, matrices).flatten(-2)


def check_divisible(name: str, what: str, sites: list[Site], unit: Callable[[Site], int]) -> None:
    """Raise one error that lists every site whose input cannot be cut into equal blocks.

    Args:
        what: the hyper-parameters that determine the block, in words.
        unit: the number by which a site's input size must be divisible.
    """
    wrong = []
    for site in sites:
        size, needed = site.in_features, unit(site)
        if size % needed:
            divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            wrong.append(f"{site.key} has {size} inputs, not divisible by {needed} ({what}); divisors: {divisors}")
    if wrong:
        raise SelectionError(problems(f"method {name!r}", wrong))
