"""LoKr: the Kronecker product of a small matrix and a low-rank one.

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
arXiv:2309.14859, section 3.3; the idea is KronA's (arXiv:2212.10650).

    W' = W + s · W1 ⊗ W2          W1 (out₁, in₁), W2 (out₂, in₂) = W2a W2b, out₁ out₂ = out, in₁ in₂ = in

`factor` is out₁ and in₁; if it does not divide a size, the largest divisor below it is taken, and -1 means the divisors
nearest to the square root. A matrix whose low-rank form would not be smaller is stored whole: W2 if the rank reaches
half of its larger side; W1 likewise with `decompose_both`, and always without it. If both are whole there is no rank,
and LyCORIS's scale is 1; PEFT keeps alpha / rank then, which is `scale_whole=True`.

Initialisation as LyCORIS's code: W2 (or W2b) zero, all else Kaiming-uniform with a = √5. (PEFT zeroes W1.)

No dense product is formed: x is folded to (in₁, in₂), W2 mixes along in₂ and W1 along in₁, W1 at the narrow end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, ModelView, Pattern, Piece, Places, Recipe, Site, cast
from inlay.methods._patterns import check_used, rank_and_alpha, settle


@dataclass(frozen=True, kw_only=True)
class LoKr(DeltaMethod):
    """Low-rank Kronecker product.

    Attributes:
        rank: rank of the larger factor.
        alpha: numerator of the scale alpha / rank.
        factor: rows and columns of the smaller factor; -1 means about the square root of the layer's.
        decompose_both: give the smaller factor a low rank too.
        scale_whole: scale by alpha / rank even if both factors are whole matrices.
        rank_pattern: ranks for single sites, by the end of their names.
        alpha_pattern: alphas for single sites, likewise.
    """

    name: ClassVar[str] = "lokr"
    paper: ClassVar[str] = "arXiv:2309.14859"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 130
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-2)  # tuned (docs/quality.md)
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")

    rank: int = 8
    alpha: float = 8.0
    factor: int = -1
    decompose_both: bool = False
    scale_whole: bool = False
    rank_pattern: Mapping[str, int] | Pattern[int] = ()
    alpha_pattern: Mapping[str, float] | Pattern[float] = ()

    def __post_init__(self) -> None:
        settle(self)
        self.require((self.factor == -1 or self.factor >= 1, f"factor is {self.factor}, expected -1 or at least 1"))

    def build(self, site: Site) -> Delta:
        return LoKrDelta(site, self, *rank_and_alpha(self, site))

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found = super().pieces(view, places)
        check_used(self, found)
        return found

    @classmethod
    def examples(cls) -> list[LoKr]:
        return [cls(rank=2, factor=4), cls(rank=1, alpha=2.0, decompose_both=True), cls(rank=64)]


class LoKrDelta(Delta):
    """At a linear layer."""

    def __init__(self, site: Site, method: LoKr, rank: int, alpha: float) -> None:
        super().__init__()
        (out_1, out_2), (in_1, in_2) = (split(n, method.factor) for n in (site.out_features, site.in_features))
        whole_1 = not method.decompose_both or rank >= max(out_1, in_1) / 2
        whole_2 = rank >= max(out_2, in_2) / 2
        self.fold = (in_1, in_2)
        self.scale = 1.0 if whole_1 and whole_2 and not method.scale_whole else alpha / rank
        self.pair("w1", site, out_1, in_1, None if whole_1 else rank)
        self.pair("w2", site, out_2, in_2, None if whole_2 else rank)

    def pair(self, name: str, site: Site, rows: int, columns: int, rank: int | None) -> None:
        """Create one factor: `name` (rows, columns), or `name_a` (rows, rank) and `name_b` (rank, columns)."""
        if rank is None:
            setattr(self, name, nn.Parameter(site.empty(rows, columns)))
        else:
            setattr(self, f"{name}_a", nn.Parameter(site.empty(rows, rank)))
            setattr(self, f"{name}_b", nn.Parameter(site.empty(rank, columns)))

    def factors(self, name: str) -> list[Tensor]:
        """The matrices whose product is the factor `name`."""
        return [p for n, p in self._parameters.items() if n.startswith(name) and p is not None]

    def initialise(self, site: Site) -> None:
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        nn.init.zeros_(self.factors("w2")[-1])

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        first = cast(_product(self.factors("w1")), x)  # (out₁, in₁)
        *wide, narrow = (cast(p, x) for p in self.factors("w2"))
        inner = F.linear(x.unflatten(-1, self.fold), narrow)  # (..., in₁, rank or out₂)
        # Contiguous; otherwise torch uses different kernels for trained and frozen matrices, which round differently.
        inner = F.linear(inner.transpose(-1, -2).contiguous(), first).transpose(-1, -2)  # (..., out₁, rank or out₂)
        for matrix in wide:
            inner = F.linear(inner.contiguous(), matrix)  # (..., out₁, out₂)
        return y.add(inner.flatten(-2), alpha=self.scale)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * torch.kron(_product(self.factors("w1")), _product(self.factors("w2"))), bias


def _product(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]


def split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`: `factor` first, or the largest divisor below it and below the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(n for n in range(most, 0, -1) if size % n == 0)
    return first, size // first
