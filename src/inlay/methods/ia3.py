"""(IA)³: learned vectors that rescale keys, values and the feed-forward's inner activations.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3.

    softmax(Q (l_k ∘ Kᵀ) / √d) (l_v ∘ V)          l_k, l_v on the outputs of the key and value projections
    (l_ff ∘ γ(W₁ x)) W₂                           l_ff on the input of the second feed-forward matrix

All vectors start at one. Query projections, attention outputs and other layers named `dense` are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, Grouped, Recipe, Site, cast
from inlay.kernels.grouped import EnteringScales, LeavingScales


@dataclass(frozen=True, kw_only=True)
class IA3(DeltaMethod):
    """Infused Adapter by Inhibiting and Amplifying Inner Activations.

    Attributes:
        entering: ends of the names of the sites whose input is rescaled instead of their output; None means those of
            the paper, the second feed-forward matrices.
    """

    name: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "arXiv:2205.05638"
    family: ClassVar[str] = "rescaling"
    table_order: ClassVar[int] = 10
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-2)
    default_where: ClassVar[tuple[str, ...]] = ("key", "value", "down")

    entering: tuple[str, ...] | None = None

    def build(self, site: Site) -> Delta:
        if self.entering is None:
            return InputDelta(site) if site.role == "down" else OutputDelta(site)
        named = any(site.key == end or site.key.endswith("." + end) for end in self.entering)
        return InputDelta(site) if named else OutputDelta(site)

    @classmethod
    def examples(cls) -> list[IA3]:
        return [cls()]


class InputDelta(Delta):
    """Rescales the layer's input: at the feed-forward's second matrix."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.scale = nn.Parameter(site.empty(site.in_features))  # (in)

    def initialise(self, site: Site) -> None:
        nn.init.ones_(self.scale)

    def pre(self, x: Tensor) -> Tensor:
        return x * cast(self.scale, x)

    @classmethod
    def grouped(cls, deltas: Sequence[Self], site: Site, dtype: torch.dtype) -> Grouped | None:
        return EnteringScales([d.scale for d in deltas], dtype)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale, bias


class OutputDelta(Delta):
    """Rescales the layer's output: keys and values."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.scale = nn.Parameter(site.empty(site.out_features))  # (out)

    def initialise(self, site: Site) -> None:
        nn.init.ones_(self.scale)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y * cast(self.scale, y)

    @classmethod
    def grouped(cls, deltas: Sequence[Self], site: Site, dtype: torch.dtype) -> Grouped | None:
        return LeavingScales([d.scale for d in deltas], dtype)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale[:, None], None if bias is None else bias * self.scale
