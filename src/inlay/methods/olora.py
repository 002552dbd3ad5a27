"""OLoRA: a low-rank update that starts on an orthonormal basis of the weight's outputs.

Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv:2406.01775, section III.

    W = Q R        B₀ = the first r columns of Q, A₀ = the first r rows of R
    h = W x + s (B A − B₀ A₀) x        A (rank, in), B (out, rank) start as A₀, B₀; s = alpha / rank

The paper takes W − s B₀ A₀ as the frozen weight; here the offset stays in the adapter (`_offset.py`), which computes
the same. The scale is that of the author's code in PEFT: it multiplies the trained and the subtracted product, and
the factors themselves are not rescaled. The decomposition is not pivoted, so A₀'s first r columns are triangular.

Places: the query and value projections, as in the author's training script, which leaves them to LoRA's default.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import Delta, DeltaMethod, Recipe, Site
from inlay.methods._low_rank import check_sizes
from inlay.methods._offset import Factors, Offset


@dataclass(frozen=True, kw_only=True)
class OLoRA(DeltaMethod):
    """Low-rank update from the weight's QR decomposition.

    Attributes:
        rank: rank of the update; at most the smaller side of every adapted weight.
        alpha: numerator of the scale alpha / rank.
    """

    name: ClassVar[str] = "olora"
    paper: ClassVar[str] = "arXiv:2406.01775"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 70
    # The author's script uses 3e-4.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)  # tuned (docs/quality.md)
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        check_sizes(self)

    def build(self, site: Site) -> Delta:
        return Offset(site, self.rank, self.alpha / self.rank, partial(orthonormal, rank=self.rank))

    @classmethod
    def examples(cls) -> list[OLoRA]:
        return [cls(rank=2), cls(rank=4, alpha=1.0)]


def orthonormal(weight: Tensor, *, rank: int) -> Factors:
    """A (rank, in), upper trapezoidal, and B (out, rank) with orthonormal columns."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]
