"""LoHa: the Hadamard product of two low-rank matrices, which can have the square of their rank.

Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
arXiv:2108.06098, proposition 1; as an update of a frozen weight: LyCORIS, arXiv:2309.14859, section 3.2.

    x ──────────────── W ──────────────── + ── y         W' = W + s (W1a W1b) ∘ (W2a W2b)
     └── (W1a W1b) ∘ (W2a W2b) ──── · s ──┘              W1a, W2a (out, rank), W1b, W2b (rank, in), s = alpha / rank

Initialisation: LyCORIS's code, which made the results: W1b and W2b standard normal, W1a normal with σ = 0.1,
W2a zero. (FedPara, whose matrices are the weight itself, draws all four by He; PEFT zeroes W2b.) That
code multiplies by s twice when it merges and once in its forward; we follow the equation: once.

The product is dense, so the forward needs another matrix of the layer's size. It is not kept for the backward pass but
computed again from its factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inlay.authoring import Delta, DeltaMethod, ModelView, Pattern, Piece, Places, Recipe, Site, cast
from inlay.methods._patterns import check_used, rank_and_alpha, settle


@dataclass(frozen=True, kw_only=True)
class LoHa(DeltaMethod):
    """Low-rank Hadamard product.

    Attributes:
        rank: rank of each of the two factors.
        alpha: numerator of the scale alpha / rank.
        rank_pattern: ranks for single sites, by the end of their names.
        alpha_pattern: alphas for single sites, likewise.
    """

    name: ClassVar[str] = "loha"
    paper: ClassVar[str] = "arXiv:2108.06098"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 120
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)  # LoRA's: the update has the same scale
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")

    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] | Pattern[int] = ()
    alpha_pattern: Mapping[str, float] | Pattern[float] = ()

    def __post_init__(self) -> None:
        settle(self)

    def build(self, site: Site) -> Delta:
        rank, alpha = rank_and_alpha(self, site)
        return LoHaDelta(site, rank, alpha / rank)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found = super().pieces(view, places)
        check_used(self, found)
        return found

    @classmethod
    def examples(cls) -> list[LoHa]:
        return [cls(rank=2, alpha=1.0)]


class LoHaDelta(Delta):
    """At a linear layer."""

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.w1_a = nn.Parameter(site.empty(site.out_features, rank))  # (out, rank)
        self.w1_b = nn.Parameter(site.empty(rank, site.in_features))  # (rank, in)
        self.w2_a = nn.Parameter(site.empty(site.out_features, rank))  # (out, rank)
        self.w2_b = nn.Parameter(site.empty(rank, site.in_features))  # (rank, in)

    def initialise(self, site: Site) -> None:
        nn.init.normal_(self.w1_a, std=0.1)
        nn.init.normal_(self.w1_b)
        nn.init.zeros_(self.w2_a)
        nn.init.normal_(self.w2_b)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.w1_a, self.w1_b, self.w2_a, self.w2_b

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        factors = [cast(f, x) for f in self.factors()]
        if torch.is_grad_enabled():
            changed = checkpoint(_apply, x, *factors, use_reentrant=False, preserve_rng_state=False)
        else:
            changed = _apply(x, *factors)
        return y.add(changed, alpha=self.scale)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * _product(*self.factors()), bias


def _product(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    """The dense update without its scale, (out, in)."""
    return (w1_a @ w1_b) * (w2_a @ w2_b)


def _apply(x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    return F.linear(x, _product(w1_a, w1_b, w2_a, w2_b))
