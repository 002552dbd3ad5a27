"""Shared by PiSSA and OLoRA: a low-rank pair that starts as a part of the frozen weight itself.

    h = W x + s (B A − B₀ A₀) x          A₀, B₀: a factorisation of part of W; A, B start as A₀, B₀

The papers write W − s B₀ A₀ into the base and train B A beside it. Here the base is never written: the adapter keeps A₀
and B₀, frozen, stored and not counted. The function and its gradients are the same, the base can serve other adapters
(or none) unchanged, and nothing is lost by rounding W − s B₀ A₀ to the base's dtype. The two products are computed
separately and in the same way, so that their difference starts at exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import ConfigError, Delta, Site, cast

Factors = tuple[Tensor, Tensor]


class Offset(Delta):
    """At a linear layer.

    Args:
        scale: s.
        factors: maps the weight, (out, in) in float32, to A₀ (rank, in) and B₀ (out, rank).
    """

    def __init__(self, site: Site, rank: int, scale: float, factors: Callable[[Tensor], Factors]) -> None:
        super().__init__()
        if rank > min(site.in_features, site.out_features):
            raise ConfigError(
                f"rank is {rank}, but the weight of {site.key} is {site.out_features} by {site.in_features}, so it has "
                "no factors of that rank; lower the rank, or leave this layer out of `where`"
            )
        self.scale, self.factors = scale, factors
        self.a = nn.Parameter(site.empty(rank, site.in_features))  # (rank, in)
        self.b = nn.Parameter(site.empty(site.out_features, rank))  # (out, rank)
        self.register_buffer("a0", site.empty(rank, site.in_features))
        self.register_buffer("b0", site.empty(site.out_features, rank))
        self.a0: Tensor
        self.b0: Tensor

    def initialise(self, site: Site) -> None:
        a, b = self.factors(site.read_weight()[0].to(self.a.dtype))
        for factor, stored in ((a, (self.a, self.a0)), (b, (self.b, self.b0))):
            for tensor in stored:
                tensor.copy_(factor)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        now = F.linear(F.linear(x, cast(self.a, x)), cast(self.b, x))
        start = F.linear(F.linear(x, cast(self.a0, x)), cast(self.b0, x))
        return y.add(now - start, alpha=self.scale)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.b @ self.a - self.b0 @ self.a0), bias
