"""Houlsby adapters: a bottleneck after attention and another after the feed-forward.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, section 2.1, figure 2.

    attention ── projection ── adapter ── + residual ── norm          h ← h + W_up f(W_down h)
    feed-forward ───────────── adapter ── + residual ── norm

The paper says a Gaussian of σ = 0.01 truncated at 2σ; the official code, which produced its results, uses σ = 0.001,
with zero biases and GELU. We follow the code; the adapter starts near the identity, not on it. The paper also trains
layer norms and the head: name the head in `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, Kind, Recipe, Site
from inlay.methods._bottleneck import BottleneckDelta, check_sizes


@dataclass(frozen=True, kw_only=True)
class Houlsby(DeltaMethod):
    """Two serial adapters a layer.

    Attributes:
        bottleneck: inner size; the paper tries 8, 64 and 256.
        nonlinearity: ``gelu``, ``relu`` or ``silu``.
    """

    name: ClassVar[str] = "houlsby"
    paper: ClassVar[str] = "arXiv:1902.00751"
    family: ClassVar[str] = "adapter"
    table_order: ClassVar[int] = 10
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3, warmup=0.1)
    default_where: ClassVar[tuple[str, ...]] = ("attention_sublayer", "mlp_sublayer")
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "output")
    expected_failures: ClassVar[Mapping[str, str]] = {"identity": "the paper starts near the identity, not on it"}

    bottleneck: int = 64
    nonlinearity: str = "gelu"

    def __post_init__(self) -> None:
        check_sizes(self, "bottleneck")

    def build(self, site: Site) -> Delta:
        return BottleneckDelta(site, self.bottleneck, self.nonlinearity, _truncated)

    @classmethod
    def examples(cls) -> list[Houlsby]:
        return [cls(bottleneck=4)]


def _truncated(down: Tensor, up: Tensor) -> None:
    for matrix in (down, up):
        nn.init.trunc_normal_(matrix, std=1e-3, a=-2e-3, b=2e-3)
