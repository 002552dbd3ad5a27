"""A low-rank update in singular triplets, and the importance of each (AdaLoRA).

x ── dropout ── Q ── · λ ── P ── · scale ── + y          Q (rank, in), λ (rank), P (out, rank)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import Adapter, Delta, Site, cast

if TYPE_CHECKING:
    from inlay.methods._steps import Steps

TENSORS = ("a", "b", "e")


class Triplets(Delta):
    """At a linear layer.

    Args:
        averages: whether it keeps moving averages of sensitivity and uncertainty, in buffers beside each tensor.
    """

    steps: Steps

    def __init__(self, site: Site, rank: int, scale: float, dropout: float = 0.0, *, averages: bool) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.a = nn.Parameter(site.empty(rank, site.in_features))  # Q (rank, in)
        self.b = nn.Parameter(site.empty(site.out_features, rank))  # P (out, rank)
        self.e = nn.Parameter(site.empty(rank))  # λ (rank)
        for name in TENSORS if averages else ():
            for average in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{name}_{average}", torch.zeros_like(self.get_parameter(name)))

    def initialise(self, site: Site) -> None:
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)
        nn.init.zeros_(self.e)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), cast(self.a, x)) * cast(self.e, x)  # (..., rank)
        return y.add(F.linear(low, cast(self.b, x)), alpha=self.scale)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * ((self.b * self.e) @ self.a), bias

    @torch.no_grad()
    def regularise(self, strength: float) -> None:
        """Add the gradients of strength · (‖QQᵀ − I‖_F + ‖PᵀP − I‖_F)."""
        for p, q in ((self.a, self.a.detach()), (self.b, self.b.detach().t())):
            off = q @ q.t()  # (rank, rank)
            off.diagonal().sub_(1)
            slope = off @ q * (2 * strength / off.norm().clamp(min=1e-12))
            slope = slope if p is self.a else slope.t()
            p.grad = slope.clone() if p.grad is None else p.grad.add_(slope)

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Update the averages with this step's weights and gradients."""
        for name in TENSORS:
            p, sensitivity, uncertainty = self._averaged(name)
            importance = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            sensitivity.lerp_(importance, 1 - beta1)
            uncertainty.lerp_((importance - sensitivity).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """The importance of each triplet, (rank)."""
        a, b, e = (sensitivity * uncertainty for _, sensitivity, uncertainty in map(self._averaged, TENSORS))
        return e + a.mean(1) + b.mean(0)

    def _averaged(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        sensitivity, uncertainty = (self.get_buffer(f"{name}_{average}") for average in ("sensitivity", "uncertainty"))
        return self.get_parameter(name), sensitivity, uncertainty


def without_pruned(adapter: Adapter) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Each site's rank, and the adapter's tensors, without the triplets whose λ is zero and without averages."""
    tensors, ranks = adapter.tensors(), {}
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(("delta/", "shared/"))}
    for piece in adapter.pieces:
        a, b, e = (tensors[f"delta/{piece.key}/{name}"] for name in TENSORS)
        kept = e.nonzero()[:, 0]
        ranks[piece.key] = len(kept)
        for name, tensor in zip(TENSORS, (a[kept], b[:, kept], e[kept]), strict=True):
            left[f"delta/{piece.key}/{name}"] = tensor
    return ranks, left
