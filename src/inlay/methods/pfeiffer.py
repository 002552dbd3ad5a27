"""Pfeiffer adapters: one bottleneck in each layer, after the feed-forward.

Pfeiffer et al. 2020, "MAD-X" (arXiv:2005.00052) and "AdapterFusion" (arXiv:2005.00247), the placement found by
architecture search: after the feed-forward, before its residual is added.

    feed-forward ── adapter ── + residual          h ← h + W_up relu(W_down h)

In MAD-X's section 3.2, and in AdapterHub's default, the adapter reads the norm of s = h + residual and adds to s. That
is this method at that norm (``where=["output_layer_norm"]`` on DistilBERT) or, in a model whose norms come first, at
the end of the layer (``where="block_output"``), without the norm:

    s ─── norm ── adapter ── + ── norm          norm(s + W_up relu(W_down norm(s)))
    └────────────────────────┘

Half of Houlsby's parameters at the same size. Initialisation as AdapterHub's: normal with σ = 0.02, zero biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, Kind, Recipe, SelectionError, Site
from inlay.methods._bottleneck import BottleneckDelta, check_sizes
from inlay.methods.bitfit import CHANNELS_FIRST


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
    table_order: ClassVar[int] = 20
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)
    default_where: ClassVar[tuple[str, ...]] = ("mlp_sublayer",)
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "output", "norm")
    expected_failures: ClassVar[Mapping[str, str]] = {"identity": "the authors start near the identity, not on it"}

    reduction: int = 16
    nonlinearity: str = "relu"

    def __post_init__(self) -> None:
        check_sizes(self, "reduction")

    def build(self, site: Site) -> Delta:
        bottleneck = BottleneckDelta(site, max(1, site.out_features // self.reduction), self.nonlinearity, _normal)
        return BeforeNorm(site, bottleneck) if site.kind == "norm" else bottleneck

    @classmethod
    def examples(cls) -> list[Pfeiffer]:
        return [cls(reduction=2)]


class BeforeNorm(Delta):
    """norm(x + bottleneck(norm(x))), at the norm."""

    merges: ClassVar[bool] = False

    def __init__(self, site: Site, bottleneck: BottleneckDelta) -> None:
        super().__init__()
        if site.module._buffers.get("running_mean") is not None:
            raise SelectionError(
                f"method 'pfeiffer': {site.path} keeps running statistics of whole batches, so its rows are not "
                "independent; leave it out of `where`"
            )
        self.features = 1 if isinstance(site.module, CHANNELS_FIRST) else -1  # which dimension they are
        self.bottleneck = bottleneck

    def initialise(self, site: Site) -> None:
        self.bottleneck.initialise(site)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        last = y.movedim(self.features, -1).contiguous()  # products of other strides round as gradients are asked for
        added = self.bottleneck.added(last).movedim(-1, self.features)
        moved = x.add(added.to(x.dtype), alpha=self.bottleneck.scale)
        return site.compute(moved) + (y - site.compute(x))  # what others at this norm did to y stays


def _normal(down: Tensor, up: Tensor) -> None:
    for matrix in (down, up):
        nn.init.normal_(matrix, std=0.02)
