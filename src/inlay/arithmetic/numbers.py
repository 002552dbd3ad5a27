"""Sums of a method's own parameters: offsets, differences, (IA)³'s vectors.

    p = p₀ + Σ w_i (p_i − p₀)          p₀ is the start, at which the method does nothing: 0, for (IA)³ 1

This is exact for a method whose change of weights is linear in its parameters. Whether it is linear is not declared but
measured on these adapters: `combining` uses this sum only if its error is rounding. For such methods TIES, DARE and
pruning work on the same parameters; for differences to the base's parameters these are the papers' task vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.core.contracts.adapter import Adapter


def alike(adapters: Sequence[Adapter]) -> bool:
    """Whether the adapters have the same method, places and frozen values."""
    first = adapters[0]
    if any(a.method != first.method or [p.key for p in a.pieces] != [p.key for p in first.pieces] for a in adapters):
        return False
    mine, frozen = numbers(first), buffers(first)
    for other in adapters[1:]:
        theirs, also = numbers(other), buffers(other)
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
            return False
        if set(also) != set(frozen) or not all(torch.equal(frozen[n], also[n]) for n in frozen):
            return False
    return True


def numbers(adapter: Adapter) -> dict[str, Tensor]:
    """Every trained tensor of the method, shared ones once, under a name that is only used in this file."""
    seen: set[int] = set()
    found = {}
    for piece, module in zip(adapter.pieces, adapter.modules(), strict=True):
        for name, value in module.named_parameters():
            if id(value) not in seen:
                seen.add(id(value))
                found[f"{piece.key}/{name}"] = value.detach()
    return found


def buffers(adapter: Adapter) -> dict[str, Tensor]:
    """Every stored tensor that is not trained."""
    found = {}
    for piece, module in zip(adapter.pieces, adapter.modules(), strict=True):
        trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        stored = module.state_dict().items()
        found.update({f"{piece.key}/{name}": value for name, value in stored if name not in trained})
    return found


@torch.no_grad()
def fill(target: Adapter, values: dict[str, Tensor], frozen: dict[str, Tensor]) -> None:
    """Fill trained and frozen values into an adapter of the same structure."""
    for name, tensor in numbers(target).items():
        tensor.copy_(values[name])
    for name, tensor in buffers(target).items():
        tensor.copy_(frozen[name])
