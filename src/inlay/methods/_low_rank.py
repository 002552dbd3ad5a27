"""Shared by LoRA and its relatives: two narrow matrices beside a frozen layer.

x ── dropout ── A ── B ── · scale ── + y          A (rank, in), B (out, rank)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import Delta, Grouped, Site, UnsupportedError, cast
from inlay.kernels.grouped import LowRanks
from inlay.kernels.low_rank import add_low_rank, applies, applies_to_layer, linear_with_low_rank


def check_sizes(method: Any, *more: tuple[bool, str]) -> None:
    """Raise one error unless the method's rank and dropout make sense and every check in `more` holds."""
    dropout = getattr(method, "dropout", 0.0)
    method.require(
        (method.rank >= 1, f"rank is {method.rank}, expected at least 1"),
        (0 <= dropout < 1, f"dropout is {dropout}, expected at least 0 and below 1"),
        *more,
    )


def low_rank(site: Site, rank: int, scale: float, dropout: float = 0.0) -> Delta:
    """The low-rank pair for the layer's kind."""
    if site.kind == "conv":
        return ConvLowRank(site, rank, scale, dropout)
    return (EmbeddingLowRank if site.kind == "embedding" else LowRank)(site, rank, scale, dropout)


class LowRank(Delta):
    """At a linear layer.

    Args:
        scale: factor on the update, alpha / rank unless the paper has another.
        dropout: dropout of the update's input, in training.
    """

    def __init__(self, site: Site, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.a = nn.Parameter(site.empty(rank, site.in_features))  # (rank, in)
        self.b = nn.Parameter(site.empty(site.out_features, rank))  # (out, rank)

    def initialise(self, site: Site) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), cast(self.a, x))  # (..., rank)
        return y.add(F.linear(low, cast(self.b, x)), alpha=self.scale)

    def post_into(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if not applies(x, y, dropout):
            return self.post(x, y, site)
        return add_low_rank(y, x, self.a, self.b, self.scale, dropout, owned=True)

    def with_layer(self, x: Tensor, site: Site) -> Tensor | None:
        layer: Any = site.module
        weight, bias, dropout = layer.weight, layer.bias, self.dropout if self.training else 0.0
        if not applies_to_layer(x, weight, bias, dropout):
            return None
        return linear_with_low_rank(x, weight, bias, self.a, self.b, self.scale, dropout)

    @classmethod
    def grouped(cls, deltas: Sequence[Self], site: Site, dtype: torch.dtype) -> Grouped | None:
        return LowRanks([d.a for d in deltas], [d.b for d in deltas], [d.scale for d in deltas], dtype)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.b @ self.a), bias


class EmbeddingLowRank(LowRank):
    """At an embedding: A has a column for each entry of the vocabulary."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site, rank, scale, dropout)
        layer: Any = site.module
        if site.original_class.forward is not nn.Embedding.forward:
            raise UnsupportedError(
                f"{site.path} ({site.original_class.__name__}) scales or shifts what it looks up, so no weight has the "
                "effect of LoRA there; name the embedding in modules_to_save"
            )
        self.padding = layer.padding_idx

    def initialise(self, site: Site) -> None:
        nn.init.zeros_(self.a)
        nn.init.normal_(self.b)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        low = F.embedding(x, self.a.t(), self.padding)  # (..., rank)
        return y.add(F.linear(cast(low, y), cast(self.b, y)), alpha=self.scale)

    post_into = Delta.post_into  # the input is ids, so there is no product to fuse


class ConvLowRank(Delta):
    """At a convolution: a narrow convolution of the same geometry, then one of size 1."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        layer: Any = site.module
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise UnsupportedError(f"{site.path}: LoRA needs a convolution with one group and zero padding")
        self.scale, self.dropout = scale, dropout
        self.convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        self.geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.a = nn.Parameter(site.empty(rank, site.in_features, *layer.kernel_size))  # (rank, in, *kernel)
        self.b = nn.Parameter(site.empty(site.out_features, rank))  # (out, rank)

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
