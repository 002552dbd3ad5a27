"""Scaled parallel adapters: a bottleneck beside the feed-forward.

He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366, table 1.

    x ── feed-forward ──────────────── + ── y          h ← h + s W_up relu(W_down x)
     └── W_down ── relu ── W_up ── · s ─┘

Initialised like LoRA: W_down Kaiming-uniform with a = √5, W_up and biases zero; s = 4.

Not to be confused with ``--method in-parallel``, the class `Parallel` (`methods/in_parallel.py`): a composition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, Kind, Recipe, Site
from inlay.methods._bottleneck import BottleneckDelta, check_sizes


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(DeltaMethod):
    """One adapter a layer, beside the feed-forward.

    Attributes:
        bottleneck: inner size; the paper uses 512.
        scale: factor on the adapter's output.
        nonlinearity: ``relu``, ``gelu`` or ``silu``.
    """

    name: ClassVar[str] = "parallel"
    paper: ClassVar[str] = "arXiv:2110.04366"
    family: ClassVar[str] = "adapter"
    table_order: ClassVar[int] = 30
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)
    default_where: ClassVar[tuple[str, ...]] = ("mlp_block",)
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "output")

    bottleneck: int = 64
    scale: float = 4.0
    nonlinearity: str = "relu"

    def __post_init__(self) -> None:
        check_sizes(self, "bottleneck")

    def build(self, site: Site) -> Delta:
        return BottleneckDelta(site, self.bottleneck, self.nonlinearity, _as_lora, scale=self.scale, beside=True)

    @classmethod
    def examples(cls) -> list[ParallelAdapter]:
        return [cls(bottleneck=4), cls(bottleneck=4, scale=1.0, nonlinearity="silu")]


def _as_lora(down: Tensor, up: Tensor) -> None:
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    nn.init.zeros_(up)
