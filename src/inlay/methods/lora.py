"""LoRA: a low-rank matrix beside the frozen one.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3; the
rank-stabilised scale is Kalajdzievski 2023, arXiv:2312.03732.

    x ──────────── W ──────────── + ── y          h = W x + s B A x
     └── dropout ── A ── B ── · s ──┘             A (rank, in), B (out, rank), s = alpha / rank

Initialisation: the paper says A Gaussian, B zero; the official code, which produced its results, draws A from
a Kaiming-uniform distribution with a = √5 and says so in a comment. We follow the code. For embeddings A is zero
and B standard normal, as in loralib. Places: the query and value projections, each with matrices of its own,
even if a model fuses them (GPT-2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import (
    Delta,
    DeltaMethod,
    Kind,
    ModelView,
    Pattern,
    Piece,
    Places,
    Recipe,
    SelectionError,
    Site,
    frozen,
    problems,
    unused,
    value_at,
)
from inlay.methods._low_rank import low_rank


@dataclass(frozen=True, kw_only=True)
class LoRA(DeltaMethod):
    """Low-rank update W + (alpha / rank) B A.

    Attributes:
        rank: rank of the update.
        alpha: numerator of the scale.
        dropout: dropout of the update's input, in training.
        rank_stabilised: scale by alpha / √rank, so that higher ranks keep learning.
        rank_pattern: ranks for single sites, by the end of their names.
        alpha_pattern: alphas for single sites, likewise.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv:2106.09685"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 10
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "embedding", "conv")

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    rank_pattern: Mapping[str, int] | Pattern[int] = ()
    alpha_pattern: Mapping[str, float] | Pattern[float] = ()

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        self.require(
            (self.rank >= 1, f"rank is {self.rank}, expected at least 1"),
            (all(r >= 1 for _, r in self.ranks), "every rank of rank_pattern must be at least 1"),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}, expected at least 0 and below 1"),
        )

    @property
    def ranks(self) -> Pattern[int]:
        return frozen(self.rank_pattern)

    @property
    def alphas(self) -> Pattern[float]:
        return frozen(self.alpha_pattern)

    def build(self, site: Site) -> Delta:
        rank, alpha = value_at(site.key, self.ranks, self.rank), value_at(site.key, self.alphas, self.alpha)
        return low_rank(site, rank, alpha / (math.sqrt(rank) if self.rank_stabilised else rank), self.dropout)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found = super().pieces(view, places)
        keys = [piece.key for piece in found]
        wrong = [f"rank_pattern: {end!r} fits none of the chosen sites" for end in unused(self.ranks, keys)]
        wrong += [f"alpha_pattern: {end!r} fits none of the chosen sites" for end in unused(self.alphas, keys)]
        if wrong:
            raise SelectionError(problems("method 'lora'", wrong))
        return found

    @classmethod
    def examples(cls) -> list[LoRA]:
        return [cls(rank=2), cls(rank=4, alpha=1.0, rank_stabilised=True), cls(rank=2, dropout=0.25)]
