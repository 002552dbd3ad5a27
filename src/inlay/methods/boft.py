"""BOFT: a dense rotation of a layer's inputs from a few sparse ones, wired like a fast Fourier transform.

Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv:2311.06243.

    x ── B_m ── … ── B₁ ── W ── (s ∘) ── y          R = B_m … B₁ for rows, W' = W Rᵀ

    B₁: blocks of b neighbours.   Bᵢ₊₁: blocks made of two runs of b / 2 that lie 2ⁱ runs apart:
        |0 1|2 3|4 5|6 7|             |0 2|1 3|4 6|5 7|             |0 4|1 5|2 6|3 7|          (runs of b / 2)

Each block is an exact Cayley transform (I − Q)(I + Q)⁻¹ of a skew Q, stored as the rows of its upper triangle: `skew`
(factors, blocks, b (b − 1) / 2). The official code trains all b² numbers of a matrix and takes their skew part: the
same rotations with twice the numbers. Q starts at zero, so R = I. One factor is OFT with blocks of b. PEFT
computes one factor wherever its CUDA extension is missing, however many were asked for.

The official code also trains a factor for each output, which the paper does not have: `scaled=True`, starting at
one; biases are not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, DeltaPiece, ModelView, Piece, Places, Recipe, Site, cast
from inlay.methods._orthogonal import TurnedDelta, TurnedPart, cayley, check_divisible, skew_matrix, turn_blocks


@dataclass(frozen=True, kw_only=True)
class BOFT(DeltaMethod):
    """Butterfly rotation of a layer's inputs.

    Attributes:
        block_size: side of each block; must be even if there are several factors.
        factors: number of sparse rotations; the layer's inputs must be divisible by block_size · 2^(factors − 1).
        scaled: also train a factor for each output.
    """

    name: ClassVar[str] = "boft"
    paper: ClassVar[str] = "arXiv:2311.06243"
    family: ClassVar[str] = "orthogonal"
    table_order: ClassVar[int] = 20
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3)  # tuned (docs/quality.md); the paper's: to 5e-4
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")

    block_size: int = 8
    factors: int = 2
    scaled: bool = False

    def __post_init__(self) -> None:
        self.require(
            (self.block_size >= 2, f"block_size is {self.block_size}, expected at least 2"),
            (self.factors >= 1, f"factors is {self.factors}, expected at least 1"),
            (self.factors < 2 or self.block_size % 2 == 0, f"block_size is {self.block_size}, expected an even number"),
        )

    def build(self, site: Site) -> Delta:
        return (BOFTPart if site.part else BOFTDelta)(site, self)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found = super().pieces(view, places)
        unit = self.block_size * 2 ** (self.factors - 1)
        what = "block_size · 2^(factors − 1)"
        check_divisible(self.name, what, [p.site for p in found if isinstance(p, DeltaPiece)], lambda site: unit)
        return found

    @classmethod
    def examples(cls) -> list[BOFT]:
        return [cls(block_size=4, factors=2), cls(block_size=2, factors=3, scaled=True), cls(block_size=8, factors=1)]


class BOFTDelta(TurnedDelta):
    """At a whole linear layer."""

    def __init__(self, site: Site, method: BOFT) -> None:
        super().__init__()
        self.size = size = method.block_size
        self.skew = nn.Parameter(site.empty(method.factors, site.in_features // size, size * (size - 1) // 2))
        self.scale = nn.Parameter(site.empty(site.out_features)) if method.scaled else None  # (out)

    def initialise(self, site: Site) -> None:
        nn.init.zeros_(self.skew)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def blocks(self) -> Tensor:  # (factors, blocks, b, b)
        return cayley(skew_matrix(self.skew, self.size))

    def turn(self, x: Tensor, *, back: bool = False) -> Tensor:
        rotations = self.rotations()
        levels = range(rotations.shape[0])
        for level in levels if back else reversed(levels):
            x = turn_pairs(x, rotations[level], 2**level, back=back)
        return x

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        y = super().post(x, y, site)
        if self.scale is None:
            return y
        bias = site.read_weight()[1]
        plain = y if bias is None else y - bias
        return y.addcmul(plain, cast(self.scale - 1, y))  # exactly y at the start, when the factor is one

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turned, bias = super().weight(weight, bias)
        return turned if self.scale is None else turned * self.scale[:, None], bias


class BOFTPart(BOFTDelta, TurnedPart):
    """At a part of a fused layer."""


def turn_pairs(x: Tensor, blocks: Tensor, distance: int, *, back: bool) -> Tensor:
    """One butterfly factor: blocks made of two runs of half their size, `distance` runs apart."""
    if distance == 1:
        return turn_blocks(x, blocks, back=back)
    runs: Tensor = x.unflatten(-1, (-1, 2, distance, blocks.shape[-1] // 2))
    pairs = runs.transpose(-3, -2)  # (..., group, distance, 2, b / 2): the two runs of a block side by side
    turned = turn_blocks(pairs.flatten(-4), blocks, back=back).reshape(pairs.shape)
    return turned.transpose(-3, -2).flatten(-4)
