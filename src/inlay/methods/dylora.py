"""DyLoRA: one training for every rank up to a largest one.

Valipour et al. 2023, "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank
Adaptation", arXiv:2210.07558, algorithm 1.

    each step     b ~ {lowest, …, rank}, the same at every site
    forward       h = W x + (alpha / b) B[:, :b] A[:b] x          A (rank, in), B (out, rank)
    backward      rows and columns up to b learn; with `frozen` only the b-th, those before it are constants

Random truncation orders the rows by importance, as nested dropout does. Afterwards the adapter can be used at any rank:
`serve_rank`, or the full one. The scale depends on the current rank, as in the paper's equation; the official code,
which multiplies alpha / rank by √(rank / b) twice, computes the same. Ranks are drawn from the seed and the number of
steps made. Both are stored with the adapter, so a resumed run continues as if it had not stopped, and checkpointed
layers recompute what they computed; all micro-batches of a step use the same b. Rows beyond b get gradients of zero,
not None. Initialisation is LoRA's. Places: query and value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.authoring import Adapter, Clock, Delta, DeltaMethod, ModelView, Piece, Places, Recipe, Shared, Site, cast
from inlay.methods._low_rank import LowRank, check_sizes


@dataclass(frozen=True, kw_only=True)
class DyLoRA(DeltaMethod):
    """Low-rank update that works at every rank.

    Attributes:
        rank: the largest rank.
        lowest: the smallest rank that is trained.
        alpha: numerator of the scale alpha / (current rank).
        dropout: dropout of the update's input, in training.
        frozen: at each step only the last row and column learn: the paper's faster, slightly worse variant.
        serve_rank: the rank outside of training and for merging; None is the largest.
        seed: seed of the drawn ranks.
    """

    name: ClassVar[str] = "dylora"
    paper: ClassVar[str] = "arXiv:2210.07558"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 100
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)  # LoRA's
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")

    rank: int = 8
    lowest: int = 1
    alpha: float = 16.0
    dropout: float = 0.0
    frozen: bool = False
    serve_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        serve = self.rank if self.serve_rank is None else self.serve_rank
        check_sizes(
            self,
            (1 <= self.lowest <= self.rank, f"lowest is {self.lowest}, expected 1 to {self.rank}"),
            (1 <= serve <= self.rank, f"serve_rank is {serve}, expected 1 to {self.rank}, or None"),
        )

    def draw(self, step: int) -> int:
        """The rank used at a step, counted from 0."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return int(torch.randint(self.lowest, self.rank + 1, (), generator=generator))

    def build(self, site: Site) -> Delta:
        return Truncated(site, self)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found: list[Any] = super().pieces(view, places)
        drawn = Drawn(self, found[0].site)
        for piece in found:
            piece.delta.drawn = drawn
        return found

    def clock(self, adapter: Adapter) -> Clock:
        return Redraw(adapter)

    @classmethod
    def examples(cls) -> list[DyLoRA]:
        return [cls(rank=4), cls(rank=3, lowest=2, frozen=True, serve_rank=2, dropout=0.25)]


class Drawn(Shared):
    """The number of steps made, and the rank for the next one."""

    def __init__(self, method: DyLoRA, site: Site) -> None:
        super().__init__("drawn")
        self.method = method
        self.steps = nn.Buffer(torch.empty((), dtype=torch.int64, device=site.device))
        self.rank = nn.Buffer(torch.empty((), dtype=torch.int64, device=site.device))

    def initialise(self, view: ModelView) -> None:
        self.steps.zero_()
        self.rank.fill_(self.method.draw(0))

    def advance(self) -> None:
        self.steps.add_(1)
        self.rank.fill_(self.method.draw(int(self.steps)))


class Truncated(LowRank):
    """A pair of which only the first rows and columns are used."""

    drawn: Drawn  # shared by all sites

    def __init__(self, site: Site, method: DyLoRA) -> None:
        super().__init__(site, method.rank, method.alpha / method.rank, method.dropout)
        self.alpha, self.frozen, self.served = method.alpha, method.frozen, method.serve_rank or method.rank

    post_into = Delta.post_into  # the fast path computes whole pairs only

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if not self.training:
            low = F.linear(x, cast(self.a[: self.served], x))
            return y.add(F.linear(low, cast(self.b[:, : self.served], x)), alpha=self.alpha / self.served)
        # A mask, not a slice: shapes stay the same at every step, for compiled graphs and for the gradients.
        rank = self.drawn.rank.to(x.device)
        place = torch.arange(1, len(self.a) + 1, device=x.device)
        a, b = cast(self.a, x), cast(self.b, x)
        if self.frozen:
            a, b = torch.where((place == rank)[:, None], a, a.detach()), torch.where(place == rank, b, b.detach())
        low = F.linear(F.dropout(x, self.dropout), a) * (place <= rank)  # (..., rank)
        return y + self.alpha / rank * F.linear(low, b)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.alpha / self.served * (self.b[:, : self.served] @ self.a[: self.served]), bias


class Redraw(Clock):
    """Draws the rank of the next step after each step."""

    def after_step(self, optimizer: Optimizer) -> None:
        piece: Any = self.adapter.pieces[0]
        piece.delta.drawn.advance()
