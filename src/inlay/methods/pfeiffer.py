"""Pfeiffer adapters: one bottleneck a layer, behind the feed-forward.

Pfeiffer et al. 2020, "MAD-X" (arXiv:2005.00052) and "AdapterFusion" (arXiv:2005.00247), the placement found by
architecture search: after the feed-forward, before its residual is added.

    feed-forward ── adapter ── + residual          h ← h + W_up relu(W_down h)

Half of Houlsby's parameters at the same size. Initialisation as AdapterHub's: normal with σ = 0.02, zero biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from inlay.core.delta import Delta, DeltaMethod
from inlay.core.layer import Kind
from inlay.core.method import Recipe
from inlay.core.site import Site
from inlay.methods._bottleneck import BottleneckDelta, check_sizes


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(DeltaMethod):
    """One serial adapter a layer.

    Attributes:
        reduction: hidden size divided by inner size.
        nonlinearity: ``relu``, ``gelu`` or ``silu``.
    """

    name: ClassVar[str] = "pfeiffer"
    paper: ClassVar[str] = "arXiv:2005.00247"
    family: ClassVar[str] = "adapter"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)
    default_where: ClassVar[tuple[str, ...]] = ("mlp_sublayer",)
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "output")
    expected_failures: ClassVar[Mapping[str, str]] = {"identity": "the authors start near the identity, not on it"}

    reduction: int = 16
    nonlinearity: str = "relu"

    def __post_init__(self) -> None:
        check_sizes(self, "reduction")

    def build(self, site: Site) -> Delta:
        return BottleneckDelta(site, max(1, site.out_features // self.reduction), self.nonlinearity, _normal)

    @classmethod
    def examples(cls) -> list[Pfeiffer]:
        return [cls(reduction=2)]


def _normal(down: Tensor, up: Tensor) -> None:
    for matrix in (down, up):
        nn.init.normal_(matrix, std=0.02)
