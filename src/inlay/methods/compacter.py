"""Compacter: Houlsby's adapters with hypercomplex, low-rank matrices, of which all layers share the small half.

Karimi Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647,
equations 4 to 6 and section 4.

    h ← h + U f(D h + b_d) + b_u          D and U are each  Σᵢ Aᵢ ⊗ (sᵢ tᵢᵀ),  i = 1 … n, for rows: x D

    Aᵢ (n, n)    `rules`, the same n matrices in every D and U of the model: trained and stored once
    sᵢ tᵢᵀ       of rank r, (in / n, r) (r, out / n): `down_left`, `down_right`, `up_left`, `up_right`

Places: behind self-attention and behind the feed-forward, before the residual is added; not behind
cross-attention, where the official code has none either (with them the paper's 0.073 % of T5-base would be 0.085 %).
Compacter++ is `where="mlp_sublayer"`. Both also train the layer norms, as an adapter of their own here.

Initialisation as in the official configurations: sᵢ and tᵢ Glorot-uniform with gain √2, Aᵢ normal with σ = 1e-4, biases
zero. So the start is near the identity, not on it. Nothing is multiplied out: a token costs about r · n · (in + out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import (
    CROSS_ATTENTION,
    Delta,
    DeltaMethod,
    DeltaPiece,
    Kind,
    ModelView,
    Piece,
    Places,
    Recipe,
    SelectionError,
    Shared,
    Site,
    cast,
    problems,
    select,
)
from inlay.methods._bottleneck import FUNCTIONS, check_sizes


@dataclass(frozen=True, kw_only=True)
class Compacter(DeltaMethod):
    """Two compact serial adapters a layer.

    Attributes:
        reduction: hidden size divided by inner size.
        divisions: n; both sizes must be divisible by it.
        rank: r of each sᵢ tᵢᵀ.
        nonlinearity: ``gelu_new``, ``gelu``, ``relu`` or ``silu``.
    """

    name: ClassVar[str] = "compacter"
    paper: ClassVar[str] = "arXiv:2106.04647"
    family: ClassVar[str] = "adapter"
    table_order: ClassVar[int] = 40
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3)  # the paper's
    default_where: ClassVar[tuple[str, ...]] = ("attention_sublayer", "mlp_sublayer")
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "output")
    expected_failures: ClassVar[Mapping[str, str]] = {"identity": "the authors start near the identity, not on it"}

    reduction: int = 32
    divisions: int = 4
    rank: int = 1
    nonlinearity: str = "gelu_new"

    def __post_init__(self) -> None:
        check_sizes(self, "reduction")
        check_sizes(self, "divisions")
        check_sizes(self, "rank")

    def build(self, site: Site) -> Delta:
        return CompacterDelta(site, self, Rules(self, site))

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        sites = select(view, places, self.default_where, self.kinds)
        if places.where is None:
            sites = [s for s in sites if not CROSS_ATTENTION.match(s.path)]
        wrong = [
            f"{s.key} has {s.out_features} outputs, a bottleneck of {s.out_features // self.reduction}: both must be "
            f"multiples of divisions = {self.divisions}; change reduction = {self.reduction}, or divisions"
            for s in sites
            if s.out_features < self.reduction
            or s.out_features % self.divisions
            or s.out_features // self.reduction % self.divisions
        ]
        if wrong:
            raise SelectionError(problems(f"method {self.name!r}", wrong))
        rules = Rules(self, sites[0])
        return [DeltaPiece(site, CompacterDelta(site, self, rules)) for site in sites]

    @classmethod
    def examples(cls) -> list[Compacter]:
        return [cls(reduction=4), cls(reduction=2, divisions=2, rank=2, nonlinearity="relu")]


class Rules(Shared):
    """The n matrices Aᵢ, (n, n, n)."""

    def __init__(self, method: Compacter, site: Site) -> None:
        super().__init__("rules")
        self.rules = nn.Parameter(site.empty(*[method.divisions] * 3))

    def initialise(self, view: ModelView) -> None:
        nn.init.normal_(self.rules, std=1e-4)


class CompacterDelta(Delta):
    """Behind a sublayer."""

    merges: ClassVar[bool] = False

    def __init__(self, site: Site, method: Compacter, shared: Rules) -> None:
        super().__init__()
        self.function, self.shared = FUNCTIONS[method.nonlinearity], shared
        n, rank, size = method.divisions, method.rank, site.out_features
        inner = size // method.reduction
        self.down_left = nn.Parameter(site.empty(n, size // n, rank))  # (n, in / n, rank)
        self.down_right = nn.Parameter(site.empty(n, rank, inner // n))  # (n, rank, inner / n)
        self.down_bias = nn.Parameter(site.empty(inner))
        self.up_left = nn.Parameter(site.empty(n, inner // n, rank))  # (n, inner / n, rank)
        self.up_right = nn.Parameter(site.empty(n, rank, size // n))  # (n, rank, out / n)
        self.up_bias = nn.Parameter(site.empty(size))

    def initialise(self, site: Site) -> None:
        for stack in (self.down_left, self.down_right, self.up_left, self.up_right):
            for matrix in stack.unbind():
                nn.init.xavier_uniform_(matrix, gain=math.sqrt(2))
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        rules = cast(self.shared.rules, y)
        inner = _multiply(y, rules, cast(self.down_left, y), cast(self.down_right, y)) + cast(self.down_bias, y)
        inner = self.function(inner)
        return y + _multiply(inner, rules, cast(self.up_left, y), cast(self.up_right, y)) + cast(self.up_bias, y)


def _multiply(x: Tensor, rules: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rows times Σᵢ Aᵢ ⊗ (leftᵢ rightᵢ), without forming the sum: (..., in) → (..., out)."""
    folded = x.unflatten(-1, (rules.shape[0], -1))  # (..., n, in / n)
    narrow = torch.einsum("...ak,ikr->...iar", folded, left)
    mixed = torch.einsum("...iar,iac->...icr", narrow, rules)
    return torch.einsum("...icr,irp->...cp", mixed, right).flatten(-2)
