"""AdapterFusion's delta: frozen members, and attention over what they add.

y ── member₀ … memberₙ ── c₀ … cₙ ── K, V          s = softmaxₙ((Q y)ᵀ (K cₙ)),  y + Σₙ sₙ V cₙ
 └── Q ─────────────────────────────
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import Clock, Delta, DeltaPiece, Site, UnsupportedError, cast

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Fused(Delta):
    """Frozen members, held as buffers, and the attention over them."""

    merges: ClassVar[bool] = False

    def __init__(self, held: Mapping[int, DeltaPiece]) -> None:
        super().__init__()
        sites = {number: piece.site for number, piece in held.items()}
        site = next(iter(sites.values()))
        if any(s.fed_by != site.fed_by for s in sites.values()):
            raise UnsupportedError(f"method 'fusion': the adapters at {site.key} read different inputs")
        self.sites = sites
        self.members = nn.ModuleDict({str(number): _frozen(piece.delta) for number, piece in held.items()})
        width = site.out_features
        self.query, self.key, self.value = (nn.Parameter(site.empty(width, width)) for _ in range(3))  # (d, d)
        self.query_bias, self.key_bias = (nn.Parameter(site.empty(width)) for _ in range(2))

    def initialise(self, site: Site) -> None:
        for number, own in self.sites.items():
            self.members[str(number)].initialise(own)  # type: ignore[operator]
        for matrix, bias in ((self.query, self.query_bias), (self.key, self.key_bias)):
            nn.init.normal_(matrix, std=0.02)
            nn.init.zeros_(bias)
        self.value.fill_(1e-6).fill_diagonal_(1.0)

    def train(self, mode: bool = True) -> Fused:
        super().train(mode)
        self.members.eval()
        return self

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        added = [self.members[str(n)].post(x, y, own).to(y.dtype) - y for n, own in self.sites.items()]  # type: ignore[operator]
        each = torch.stack(added, dim=-2)  # (..., adapters, d)
        query = F.linear(y, cast(self.query, y), cast(self.query_bias, y))
        keys = F.linear(each, cast(self.key, y), cast(self.key_bias, y))
        shares = (keys @ query[..., None]).softmax(dim=-2)  # (..., adapters, 1)
        return y + (shares * F.linear(each, cast(self.value, y))).sum(-2)


def _frozen(delta: Delta) -> Delta:
    """The same delta with its parameters turned into buffers: stored, moved and copied, but never trained."""
    for module in delta.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                del module._parameters[name]
                module.register_buffer(name, value.detach())
    return delta.eval()


class PullToIdentity(Clock):
    """Adds the gradient of λ ‖V − I‖² before every step."""

    def before_step(self, optimizer: Optimizer) -> None:
        method: Any = self.adapter.method
        for module in self.adapter.modules():
            assert isinstance(module, Fused)
            if module.value.grad is not None:
                identity = torch.eye(len(module.value), dtype=module.value.dtype, device=module.value.device)
                module.value.grad.add_(module.value.detach() - identity, alpha=2 * method.regularisation)
