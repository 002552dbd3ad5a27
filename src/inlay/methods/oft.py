"""OFT: the frozen weight's inputs are rotated, block by block, so that angles between neurons stay.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280, section 3;
applied to the activations as in "OFTv2", arXiv:2506.19847.

    x ── R ── W ── y          W' = W Rᵀ, R = diag(R₁ … R_k), Rᵢ = (I − Qᵢ)(I + Qᵢ)⁻¹, Qᵢᵀ = −Qᵢ
                              `skew` (blocks, b (b − 1) / 2): the rows of each Qᵢ's upper triangle

Q starts at zero, so R = I. The paper writes (I + Q)(I − Q)⁻¹, its code the inverse: the same set of rotations, with
Q for −Q. We follow the code, as PEFT's exact form does. The inverse is exact, so R is orthogonal; OFTv2's
Cayley–Neumann series, PEFT's default, is `neumann_terms` and only approximately orthogonal:

    R ≈ (I − Q)(I − Q + Q² − … ± Q^(terms − 2))          PEFT's series has Q for −Q, unlike its own exact form
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, DeltaPiece, ModelView, Piece, Places, Recipe, Site
from inlay.methods._orthogonal import TurnedDelta, TurnedPart, cayley, check_divisible, skew_matrix, turn_blocks


@dataclass(frozen=True, kw_only=True)
class OFT(DeltaMethod):
    """Block-diagonal rotation of a layer's inputs.

    Attributes:
        block_size: side of each block, which must divide the layer's inputs; 32 if `blocks` is not given either.
        blocks: number of blocks, instead of their size.
        share_blocks: use one rotation for all blocks of a layer.
        neumann_terms: number of powers of Q in the truncated series, I included; None is the exact inverse.
    """

    name: ClassVar[str] = "oft"
    paper: ClassVar[str] = "arXiv:2306.07280"
    family: ClassVar[str] = "orthogonal"
    table_order: ClassVar[int] = 10
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3)  # tuned (docs/quality.md); OFTv2's are a few times LoRA's
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")

    block_size: int | None = None
    blocks: int | None = None
    share_blocks: bool = False
    neumann_terms: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is None and self.blocks is None:
            object.__setattr__(self, "block_size", 32)
        size, count, terms = self.block_size, self.blocks, self.neumann_terms
        self.require(
            ((size is None) != (count is None), f"block_size is {size} and blocks is {count}: give one of the two"),
            (size is None or size >= 2, f"block_size is {size}, expected at least 2"),
            (count is None or count >= 1, f"blocks is {count}, expected at least 1"),
            (terms is None or terms >= 3, f"neumann_terms is {terms}, expected None or at least 3"),
        )

    def build(self, site: Site) -> Delta:
        size = self.block_size or site.in_features // (self.blocks or 1)
        return (OFTPart if site.part else OFTDelta)(site, self, size)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found = super().pieces(view, places)
        unit, what = (self.block_size, "block_size") if self.block_size else (self.blocks or 1, "blocks")
        check_divisible(self.name, what, [p.site for p in found if isinstance(p, DeltaPiece)], lambda site: unit)
        return found

    @classmethod
    def examples(cls) -> list[OFT]:
        return [cls(block_size=8), cls(blocks=4, share_blocks=True), cls(block_size=4, neumann_terms=5)]


class OFTDelta(TurnedDelta):
    """At a whole linear layer."""

    def __init__(self, site: Site, method: OFT, size: int) -> None:
        super().__init__()
        self.size, self.terms = size, method.neumann_terms
        blocks = 1 if method.share_blocks else site.in_features // size
        self.skew = nn.Parameter(site.empty(blocks, size * (size - 1) // 2))

    def initialise(self, site: Site) -> None:
        nn.init.zeros_(self.skew)

    def blocks(self) -> Tensor:  # (blocks, size, size)
        skew = skew_matrix(self.skew, self.size)
        return cayley(skew) if self.terms is None else neumann(skew, self.terms)

    def turn(self, x: Tensor, *, back: bool = False) -> Tensor:
        return turn_blocks(x, self.rotations(), back=back)


class OFTPart(OFTDelta, TurnedPart):
    """At a part of a fused layer."""


def neumann(skew: Tensor, terms: int) -> Tensor:
    """The Cayley transform with a truncated series for the inverse: (I − Q) Σ (−Q)ⁱ for i up to terms − 2."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    total = power = one
    for _ in range(terms - 2):
        power = -(power @ skew)
        total = total + power
    return total - total @ skew
