"""Ladder side tuning's delta: the whole side network, at the end of the stack (`ladder.py` has its equations).

D (1 + rungs, side, hidden) with biases, U (hidden, side); W_in (rungs, expansion · side, side), W_out the other way
round; with attention Q, K, V, O (rungs, side, side) in heads of equal size. Initialisation as in the official code: D
and U PyTorch's, gates zero, norms one, blocks normal with σ = 1/√fan-in (its T5, whose attention scores are not divided
by √size, draws Q smaller by that factor).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import Delta, ModelView, Site, UnsupportedError, cast, current_span
from inlay.methods._bottleneck import FUNCTIONS

if TYPE_CHECKING:
    from inlay.methods.ladder import LadderSideTuning


def heads_of(view: ModelView) -> int | None:
    """Attention heads of a base known to be bidirectional; None for others, including an encoder–decoder's decoder."""
    generates = getattr(view.model, "can_generate", None)
    if getattr(view.config, "is_encoder_decoder", False) or (generates is not None and generates()):
        return None
    try:
        places = view.attention_places()
    except UnsupportedError:
        return None
    return None if any(getattr(p.module, "is_causal", True) for p in places) else places[0].heads


class SideNetwork(Delta):
    """Gated rungs and feed-forward blocks, which treat each token by itself."""

    merges: ClassVar[bool] = False

    def __init__(self, site: Site, rungs: int, method: LadderSideTuning) -> None:
        super().__init__()
        hidden, side = site.in_features, max(site.in_features // method.reduction, 1)
        self.method, self.function = method, FUNCTIONS[method.nonlinearity]
        self.down = nn.Parameter(site.empty(1 + rungs, side, hidden))
        self.down_bias = nn.Parameter(site.empty(1 + rungs, side))
        self.gates = nn.Parameter(site.empty(rungs + (method.output == "both")))
        self.norms = nn.Parameter(site.empty(rungs + 1, side))
        self.inner = nn.Parameter(site.empty(rungs, method.expansion * side, side))
        self.outer = nn.Parameter(site.empty(rungs, side, method.expansion * side))
        self.up = nn.Parameter(site.empty(hidden, side))
        self.up_bias = nn.Parameter(site.empty(hidden))

    def initialise(self, site: Site) -> None:
        for weight, bias in ((self.down, self.down_bias), (self.up, self.up_bias)):
            bound = weight.shape[-1] ** -0.5  # nn.Linear's, for both
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        nn.init.zeros_(self.gates)
        nn.init.ones_(self.norms)
        for weight in (self.inner, self.outer):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def post(self, x: Any, y: Tensor, site: Site) -> Tensor:
        states = [*x, y] if len(x) < self.down.shape[0] else list(x)
        shares = [cast(g, y) for g in torch.sigmoid(self.gates / self.method.temperature)]
        seen, side = self.seen(y, site), self._read(0, states[0])
        for rung, state in enumerate(states[1:]):
            side = shares[rung] * side + (1 - shares[rung]) * self._read(rung + 1, state)
            side = self.block(rung, side, seen)
        last = F.dropout(_normed(side, self.norms[-1]), self.method.dropout, self.training)
        out = F.linear(last, cast(self.up, last), cast(self.up_bias, last))
        return out if self.method.output == "side" else shares[-1] * out + (1 - shares[-1]) * y

    def seen(self, y: Tensor, site: Site) -> Tensor | None:
        """Which tokens each token may attend to; None if blocks do not attend."""
        return None

    def block(self, rung: int, side: Tensor, seen: Tensor | None) -> Tensor:
        """Side block `rung`: (rows, tokens, side) → the same."""
        inner = self.function(F.linear(_normed(side, self.norms[rung]), cast(self.inner[rung], side)))
        return side + F.linear(inner, cast(self.outer[rung], inner))

    def _read(self, index: int, state: Tensor) -> Tensor:
        state = F.dropout(state, self.method.dropout, self.training)
        return F.linear(state, cast(self.down[index], state), cast(self.down_bias[index], state))


class SideTransformer(SideNetwork):
    """Gated rungs and whole transformer blocks, beside a bidirectional base."""

    reads_span: ClassVar[bool] = True  # in an encoder, the rows without their padding

    def __init__(self, site: Site, rungs: int, method: LadderSideTuning, heads: int) -> None:
        super().__init__(site, rungs, method)
        side = self.norms.shape[1]
        self.heads = math.gcd(side, heads)
        self.attention_norms = nn.Parameter(site.empty(rungs, side))
        self.query, self.key, self.value, self.out = (nn.Parameter(site.empty(rungs, side, side)) for _ in range(4))

    def initialise(self, site: Site) -> None:
        super().initialise(site)
        nn.init.ones_(self.attention_norms)
        for weight in (self.query, self.key, self.value, self.out):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def seen(self, y: Tensor, site: Site) -> Tensor | None:
        first, behind = current_span(site)[:, :, None].unbind(1)  # (rows, 1)
        at = torch.arange(y.shape[1], device=y.device)
        return ((at >= first) & (at < behind))[:, None, None]  # (rows, 1, 1, tokens)

    def block(self, rung: int, side: Tensor, seen: Tensor | None) -> Tensor:
        normed = _normed(side, self.attention_norms[rung])
        query, key, value = (
            F.linear(normed, cast(weight[rung], normed)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for weight in (self.query, self.key, self.value)
        )  # (rows, heads, tokens, size)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return super().block(rung, side + F.linear(mixed.transpose(1, 2).flatten(2), cast(self.out[rung], mixed)), seen)


def _normed(side: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(side, side.shape[-1:], cast(weight, side), eps=1e-6)
