"""An adapter's effect on each weight of its base.

A delta's change is `weight(W, b) - (W, b)` in double precision. If it is a product of two narrow matrices, the factors
are used instead, so that nothing dense is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.arithmetic.low_rank import Factors
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.delta import Delta
from inlay.core.contracts.pieces import DeltaPiece, Piece, PromptPiece, SubsetPiece
from inlay.core.errors import UnsupportedError, problems
from inlay.methods._low_rank import ConvLowRank, LowRank
from inlay.methods._offset import Offset
from inlay.methods._triplets import Triplets
from inlay.methods.dylora import Truncated
from inlay.methods.vera import VeRADelta


def check_has_weights(adapters: Sequence[Adapter]) -> None:
    """Raise one `UnsupportedError` that names every adapter whose effect is not a change of weights."""
    wrong = []
    for adapter in adapters:
        prompts = any(isinstance(p, PromptPiece) for p in adapter.pieces)
        acting = {type(p.delta).__name__ for p in adapter.pieces if isinstance(p, DeltaPiece) and not p.delta.merges}
        if prompts:
            wrong.append(f"{adapter.name!r} ({adapter.method.name}) is a prompt, which has no effect on weights")
        elif acting:
            kinds = ", ".join(sorted(acting))
            wrong.append(f"{adapter.name!r} ({adapter.method.name}) acts on activations ({kinds})")
        elif any(p.label for p in adapter.pieces if not isinstance(p, PromptPiece)):
            wrong.append(f"{adapter.name!r} ({adapter.method.name}) is a composition; combine its members")
    if wrong:
        raise UnsupportedError(problems("only adapters with a weight view can be combined", wrong))


def factors_of(delta: Delta) -> Factors | None:
    """The change as two factors, if it is known to be a product of two; else None."""
    read = _FACTORS.get(type(delta).weight)
    return None if read is None else read(delta)


def _plain(delta: Any) -> Factors:
    return Factors(delta.scale * delta.b.detach(), delta.a.detach().flatten(1))


def _moved(delta: Any) -> Factors:
    """B A − B₀ A₀ as one product."""
    left = torch.cat([delta.scale * delta.b.detach(), -delta.scale * delta.b0], 1)
    return Factors(left, torch.cat([delta.a.detach(), delta.a0]))


def _triplets(delta: Any) -> Factors:
    """P Λ Q without the triplets that were pruned."""
    kept = delta.e.detach() != 0
    kept[0] |= ~kept.any()  # keep at least one: a LoRA has at least rank 1
    return Factors(delta.scale * (delta.b * delta.e).detach()[:, kept], delta.a.detach()[kept])


def _truncated(delta: Any) -> Factors:
    rank = delta.served
    return Factors(delta.alpha / rank * delta.b.detach()[:, :rank], delta.a.detach()[:rank])


def _projected(delta: Any) -> Factors:
    a, b = delta.pair(delta.d)
    return Factors((delta.b[:, None] * b).detach(), (delta.d[:, None] * a).detach())


# Keyed by the weight view itself, because a subclass with another one has other factors, or none.
_FACTORS: dict[Callable[..., object], Callable[[Any], Factors]] = {
    LowRank.weight: _plain,
    ConvLowRank.weight: _plain,
    Offset.weight: _moved,
    Triplets.weight: _triplets,
    Truncated.weight: _truncated,
    VeRADelta.weight: _projected,
}


@torch.no_grad()
def change(piece: Piece, model: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
    """The change of weight and bias, or of the parameter if the piece is a difference; in double precision."""
    if isinstance(piece, SubsetPiece):
        old = base_value(model, piece.name)
        return piece.difference.apply_to(old) - old, None
    assert isinstance(piece, DeltaPiece)
    weight, bias = piece.site.read_weight()
    old, old_bias = weight.detach().double(), None if bias is None else bias.detach().double()
    new, new_bias = piece.delta.weight(old, old_bias)
    return new - old, None if new_bias is None or old_bias is None else new_bias - old_bias


def base_value(model: torch.nn.Module, name: str) -> Tensor:
    """A parameter of the base itself, in double precision, whatever adapter is active."""
    path, _, own = name.rpartition(".")
    value = model.get_submodule(path)._parameters[own]
    assert value is not None
    return value.detach().double()
