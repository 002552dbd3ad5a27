"""LoRA: a low-rank matrix beside the frozen one.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3; the
rank-stabilised scale is Kalajdzievski 2023, arXiv:2312.03732.

    x ──────────── W ──────────── + ── y          h = W x + s B A x
     └── dropout ── A ── B ── · s ──┘             A (rank, in), B (out, rank), s = alpha / rank

Initialisation: the paper says A Gaussian, B zero; the official code, which produced its results, draws A from
a Kaiming-uniform distribution with a = √5 and says so in a comment. We follow the code. For embeddings A is zero
and B standard normal, as in loralib. Places: the query and value projections, each with matrices of its own
also where a model fuses them (GPT-2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.delta import Delta, DeltaMethod, cast
from inlay.core.errors import UnsupportedError
from inlay.core.layer import Kind
from inlay.core.method import Recipe
from inlay.core.site import Site


@dataclass(frozen=True, kw_only=True)
class LoRA(DeltaMethod):
    """Low-rank update W + (alpha / rank) B A.

    Attributes:
        rank: of the update.
        alpha: numerator of the scale.
        dropout: on the update's input, in training.
        rank_stabilised: scale by alpha / √rank, so that higher ranks keep learning.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv:2106.09685"
    family: ClassVar[str] = "low rank"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "embedding", "conv")

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        self.require(
            (self.rank >= 1, f"rank is {self.rank}, expected at least 1"),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}, expected at least 0 and below 1"),
        )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def build(self, site: Site) -> Delta:
        if site.kind == "conv":
            return ConvDelta(site, self)
        return EmbeddingDelta(site, self) if site.kind == "embedding" else LinearDelta(site, self)

    @classmethod
    def examples(cls) -> list[LoRA]:
        return [cls(rank=2), cls(rank=4, alpha=1.0, rank_stabilised=True), cls(rank=2, dropout=0.25)]


class LinearDelta(Delta):
    """At a linear layer."""

    def __init__(self, site: Site, method: LoRA) -> None:
        super().__init__()
        self.scale, self.dropout = method.scale, method.dropout
        self.a = nn.Parameter(site.empty(method.rank, site.in_features))  # (rank, in)
        self.b = nn.Parameter(site.empty(site.out_features, method.rank))  # (out, rank)

    def initialise(self, site: Site) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), cast(self.a, x))  # (..., rank)
        return y.add(F.linear(low, cast(self.b, x)), alpha=self.scale)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.b @ self.a), bias


class EmbeddingDelta(LinearDelta):
    """At an embedding: A holds a column an entry."""

    def __init__(self, site: Site, method: LoRA) -> None:
        super().__init__(site, method)
        layer: Any = site.module
        if site.original_class.forward is not nn.Embedding.forward:
            raise UnsupportedError(
                f"{site.path} ({site.original_class.__name__}) scales or moves what it looks up, so LoRA there has no "
                "weights of the same effect; name the embedding in modules_to_save"
            )
        self.padding = layer.padding_idx

    def initialise(self, site: Site) -> None:
        nn.init.zeros_(self.a)
        nn.init.normal_(self.b)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        low = F.embedding(x, self.a.t(), self.padding)  # (..., rank)
        return y.add(F.linear(cast(low, y), cast(self.b, y)), alpha=self.scale)


class ConvDelta(Delta):
    """At a convolution: a narrow convolution of the same geometry, then one of size 1."""

    def __init__(self, site: Site, method: LoRA) -> None:
        super().__init__()
        layer: Any = site.module
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise UnsupportedError(f"{site.path}: LoRA needs a convolution with one group and zero padding")
        self.scale, self.dropout = method.scale, method.dropout
        self.convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        self.geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.a = nn.Parameter(site.empty(method.rank, site.in_features, *layer.kernel_size))  # (rank, in, *kernel)
        self.b = nn.Parameter(site.empty(site.out_features, method.rank))  # (out, rank)

    def initialise(self, site: Site) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        low = self.convolve(F.dropout(x, self.dropout, self.training), cast(self.a, x), **self.geometry)
        point = cast(self.b, x).reshape(*self.b.shape, *(1,) * (self.a.dim() - 2))
        return y.add(self.convolve(low, point), alpha=self.scale)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        update = (self.b @ self.a.flatten(1)).reshape(weight.shape)
        return weight + self.scale * update, bias
