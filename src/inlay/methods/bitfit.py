"""BitFit: only the biases are trained.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", arXiv:2106.10199.

    y = W x + b + d          d starts at zero; at every layer that has a bias, norms included

A model without biases (Llama) has nothing to train, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, Grouped, Kind, Recipe, SelectionError, Site, cast, problems
from inlay.kernels.grouped import Offsets

CHANNELS_FIRST = (
    *(nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


@dataclass(frozen=True, kw_only=True)
class BitFit(DeltaMethod):
    """A trained offset on every bias. No hyper-parameters."""

    name: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "arXiv:2106.10199"
    family: ClassVar[str] = "selective"
    table_order: ClassVar[int] = 10
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3)
    default_where: ClassVar[str] = "biases"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "norm", "conv")

    def build(self, site: Site) -> Delta:
        if not site.bias:
            raise SelectionError(problems("where", [f"{site.path} has no bias to train"]))
        return BiasDelta(site)

    @classmethod
    def examples(cls) -> list[BitFit]:
        return [cls()]


class BiasDelta(Delta):
    """An offset for each output feature."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.channels_first = site.kind == "conv" or isinstance(site.module, CHANNELS_FIRST)
        self.offset = nn.Parameter(site.empty(site.out_features))  # (out)

    def initialise(self, site: Site) -> None:
        nn.init.zeros_(self.offset)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        offset = cast(self.offset, y)
        if self.channels_first:
            offset = offset.reshape(-1, *(1,) * (y.dim() - 2))  # (out, 1, ...) beside (batch, out, ...)
        return y + offset

    @classmethod
    def grouped(cls, deltas: Sequence[Self], site: Site, dtype: torch.dtype) -> Grouped | None:
        return None if deltas[0].channels_first else Offsets([d.offset for d in deltas], dtype)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert bias is not None
        return weight, bias + self.offset
