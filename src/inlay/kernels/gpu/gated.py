"""The backward pass of f(g) ∘ u in one pass over g, u and the gradient, for functions that are known.

    du = dh ∘ f(g)        dg = dh ∘ u ∘ f′(g)

A function is recognised by its values, not by its module.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "tanh": functools.partial(F.gelu, approximate="tanh")}
_SEEN: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


@triton.jit
def _backward(grad, gate, up, d_gate, d_up, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    dh = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu":
        s = tl.sigmoid(g)
        value, slope = g * s, s * (1 + g * (1 - s))
    else:  # GELU by tanh: ½ g (1 + tanh(c (g + k g³)))
        c, k = 0.7978845608028654, 0.044715
        t = 2 * tl.sigmoid(2 * c * (g + k * g * g * g)) - 1
        value, slope = 0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * c * (1 + 3 * k * g * g)
    tl.store(d_gate + at, (dh * u * slope).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, (dh * value).to(d_up.dtype.element_ty), mask=inside)


def known(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name of the function if it is a known one, else None."""
    if function not in _SEEN:
        with torch.no_grad():
            at = torch.linspace(-8, 8, 1001)
            _SEEN[function] = next(
                (n for n, f in KNOWN.items() if torch.allclose(function(at), f(at), atol=1e-6)), None
            )
    return _SEEN[function]


def backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, for a `known` function."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gate):
        _backward[(triton.cdiv(gate.numel(), BLOCK),)](grad, gate, up, d_gate, d_up, gate.numel(), kind, BLOCK)
    return d_gate, d_up
