"""VeRA: one frozen random pair of matrices for all layers, and two trained vectors a layer.

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454, equation 2.

    x ── A ── d ∘ ── B ── b ∘ ── + y          h = W x + Λ_b B Λ_d A x
                                              A (rank, in), B (out, rank) frozen; d (rank), b (out) trained

Initialisation: A and B Kaiming-uniform, the same for every layer; d = 0.1, b = 0. If layers differ in size, the
pair has the largest input and output among them, and each layer takes its first columns and rows, as in PEFT;
the paper has one size. Only vectors are trained and counted. The pair could be drawn again from its seed, but
generators differ between versions and devices, so it is stored with the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, DeltaPiece, ModelView, Piece, Places, Recipe, Shared, Site, cast, select


@dataclass(frozen=True, kw_only=True)
class VeRA(DeltaMethod):
    """Vectors that scale a shared random projection.

    Attributes:
        rank: rank of the shared matrices; an order of magnitude higher than LoRA's.
        dropout: dropout of the update's input, in training.
        start: initial value of d.
        seed: seed of the shared matrices; PEFT's ``projection_prng_key`` gives the same ones.
    """

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "arXiv:2310.11454"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 110
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-2)  # the paper's on most of GLUE: an order above LoRA's
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")

    rank: int = 256
    dropout: float = 0.0
    start: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(
            (self.rank >= 1, f"rank is {self.rank}, expected at least 1"),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}, expected at least 0 and below 1"),
        )

    def build(self, site: Site) -> Delta:
        return VeRADelta(site, self, Projections(self, [site]))

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        sites = select(view, places, self.default_where, self.kinds)
        projections = Projections(self, sites)
        return [DeltaPiece(site, VeRADelta(site, self, projections)) for site in sites]

    @classmethod
    def examples(cls) -> list[VeRA]:
        return [cls(rank=8, start=0.5), cls(rank=4, dropout=0.25)]


class Projections(Shared):
    """The frozen pair: `a` (rank, largest in) and `b` (largest out, rank)."""

    a: Tensor
    b: Tensor

    def __init__(self, method: VeRA, sites: list[Site]) -> None:
        super().__init__("projections")
        self.seed = method.seed
        inner, outer = max(s.in_features for s in sites), max(s.out_features for s in sites)
        self.register_buffer("a", sites[0].empty(method.rank, inner))
        self.register_buffer("b", sites[0].empty(outer, method.rank))

    def initialise(self, view: ModelView) -> None:
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU, for the same numbers on every device
        for matrix in (self.a, self.b):
            drawn = torch.empty(matrix.shape)
            nn.init.kaiming_uniform_(drawn, nonlinearity="relu", generator=generator)
            matrix.copy_(drawn)


class VeRADelta(Delta):
    """At a linear layer."""

    def __init__(self, site: Site, method: VeRA, projections: Projections) -> None:
        super().__init__()
        self.dropout, self.start = method.dropout, method.start
        self.inner, self.outer = site.in_features, site.out_features
        self.projections = projections
        self.d = nn.Parameter(site.empty(method.rank))  # (rank)
        self.b = nn.Parameter(site.empty(site.out_features))  # (out)

    def initialise(self, site: Site) -> None:
        nn.init.constant_(self.d, self.start)
        nn.init.zeros_(self.b)

    def pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's rows and columns of A and B, on its device."""
        shared = self.projections
        return shared.a[:, : self.inner].to(like), shared.b[: self.outer].to(like)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        a, b = self.pair(x)
        low = F.linear(F.dropout(x, self.dropout, self.training), a) * cast(self.d, x)  # (..., rank)
        return y.addcmul(F.linear(low, b), cast(self.b, y))

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.pair(self.d)
        return weight + (self.b[:, None] * b) @ (self.d[:, None] * a), bias
