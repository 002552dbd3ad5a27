"""DoRA: a low-rank update of the weight's direction, and its magnitude on its own.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, equations 5 and 11.

    W' = m ∘ (W + s B A) / ‖W + s B A‖            norm over each output's row of an nn.Linear weight
    m starts at ‖W‖, so W' = W; the norm is a constant in the backward pass (section 4.3)

The rows' norms are found without forming the dense sum:

    ‖W + sBA‖² = ‖W‖² + 2s ⟨W Aᵀ, B⟩ + s² ⟨B A Aᵀ, B⟩      per row; ‖W‖² is computed once

Dropout acts on the input of both base and update, as in the authors' code, because m multiplies both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import (
    Delta,
    DeltaMethod,
    Grouped,
    ModelView,
    Pattern,
    Piece,
    Places,
    Recipe,
    Site,
    cast,
    stamp,
    transformed,
)
from inlay.kernels.grouped import LowRanks, Turned
from inlay.methods._patterns import check_used, rank_and_alpha, settle


@dataclass(frozen=True, kw_only=True)
class DoRA(DeltaMethod):
    """Weight-decomposed low-rank update.

    Attributes:
        rank: rank of the direction's update; the paper uses half of LoRA's.
        alpha: numerator of the scale alpha / rank.
        dropout: dropout of the layer's input, for the base too, in training.
        rank_pattern: ranks for single sites, by the end of their names.
        alpha_pattern: alphas for single sites, likewise.
    """

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "arXiv:2402.09353"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 20
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)
    default_where: ClassVar[tuple[str, ...]] = ("query", "key", "value", "up", "down")

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] | Pattern[int] = ()
    alpha_pattern: Mapping[str, float] | Pattern[float] = ()

    def __post_init__(self) -> None:
        settle(self)
        self.require((0 <= self.dropout < 1, f"dropout is {self.dropout}, expected at least 0 and below 1"))

    def build(self, site: Site) -> Delta:
        rank, alpha = rank_and_alpha(self, site)
        if self.dropout:
            return DroppedDelta(site, rank, alpha / rank, self.dropout)
        return DoRADelta(site, rank, alpha / rank)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found = super().pieces(view, places)
        check_used(self, found)
        return found

    @classmethod
    def examples(cls) -> list[DoRA]:
        return [cls(rank=2), cls(rank=4, alpha=1.0)]


class DoRADelta(Delta):
    """At a linear layer."""

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(site.empty(rank, site.in_features))  # (rank, in)
        self.b = nn.Parameter(site.empty(site.out_features, rank))  # (out, rank)
        self.magnitude = nn.Parameter(site.empty(site.out_features))  # (out)
        self.squares: tuple[tuple[int, int, int], Tensor] | None = (
            None  # row norms of the frozen weight, and the weight's stamp
        )

    def initialise(self, site: Site) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)
        # The same expression by which `post` divides, so that the quotient starts at exactly 1.
        self.magnitude.copy_(self.norm(site.read_weight()[0]))

    def norm(self, weight: Tensor) -> Tensor:
        """Row norms of W + s B A, (out), float32, without the dense sum."""
        cross = F.linear(weight, cast(self.a, weight)).float()  # W Aᵀ, (out, rank)
        low = self.b @ (self.a @ self.a.t())  # (out, rank)
        squares = (2 * self.scale * cross + self.scale**2 * low).mul(self.b).sum(1)
        return (self.base_squares(weight) + squares).clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def base_squares(self, weight: Tensor) -> Tensor:
        """‖W‖² of each row, computed again only when the base's weight has changed."""
        if transformed():
            return weight.float().square().sum(1)
        which = stamp(weight)
        if self.squares is None or self.squares[0] != which:
            self.squares = (which, weight.float().square().sum(1))
        return self.squares[1]

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        weight, bias = site.read_weight()
        with torch.no_grad():
            norm = self.norm(weight)
        update = F.linear(F.linear(x, cast(self.a, x)), cast(self.b, x))
        plain = y if bias is None else y - bias
        turned = plain.add(update, alpha=self.scale) * cast(self.magnitude / norm, y)
        return turned if bias is None else turned + bias

    @classmethod
    def grouped(cls, deltas: Sequence[Self], site: Site, dtype: torch.dtype) -> Grouped | None:
        weight, bias = site.read_weight()
        gains = [(d.magnitude / d.norm(weight)).detach() for d in deltas]
        update = LowRanks([d.a for d in deltas], [d.b for d in deltas], [d.scale for d in deltas], dtype)
        return Turned(update, gains, bias, dtype)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turned = weight + self.scale * (self.b @ self.a)
        return turned * (self.magnitude / turned.norm(dim=1))[:, None], bias


class DroppedDelta(DoRADelta):
    """With dropout in front of the layer."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site, rank, scale)
        self.dropout = dropout

    def pre(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
