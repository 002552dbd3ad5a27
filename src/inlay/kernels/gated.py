"""A gated feed-forward that keeps what its two first matrices computed, and nothing made of that.

    h = f(g) ∘ u,   g = gate(x),   u = up(x),   y = down(h)

Models keep f(g) as well; here it is computed again in the backward pass, which takes a pass over g. Acts on modules
with children `gate_proj`, `up_proj`, `down_proj` and `act_fn` whose own forward is seen to be this one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.forward.host import Host
from inlay.core.forward.transforms import transformed, watched
from inlay.core.model.view import ModelView
from inlay.kernels import gpu, second

CHILDREN = ("gate_proj", "up_proj", "down_proj", "act_fn")
# Module → whether its forward is the one of the formula.
_SEEN: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def gated(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A feed-forward's forward."""
    x: Any = args[0] if args else None
    if len(args) != 1 or kwargs or not applies(host.module, x):
        return inner(*args, **kwargs)
    if host.module not in _SEEN:
        _SEEN[host.module] = _agree(host.module, inner, x)
    return compute(host.module, x) if _SEEN[host.module] else inner(x)


def applies(module: nn.Module, x: Any) -> bool:
    """Whether gradients are wanted, of what lies inside or of x, and nobody trains or watches the nonlinearity."""
    return (
        not transformed()
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and not torch.is_autocast_enabled(x.device.type)
        and not any(m._parameters or watched(m) for m in module.act_fn.modules())  # type: ignore[union-attr]
    )


def compute(module: Any, x: Tensor) -> Any:
    """The formula, through the children, adapters and all."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    if not (gate.requires_grad or up.requires_grad):
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(Gate.apply(gate, up, module.act_fn))  # type: ignore[no-untyped-call]


def _agree(module: nn.Module, inner: Callable[..., Any], x: Tensor) -> bool:
    """Whether the module's own forward gives exactly the formula's result, tried without a trace."""
    outs = []
    with torch.no_grad():
        for way in (inner, functools.partial(compute, module)):
            with torch.random.fork_rng():
                torch.manual_seed(0)  # the same masks of dropout
                outs.append(way(x.detach()))
    return type(outs[0]) is Tensor and torch.equal(*outs)


class Gate(torch.autograd.Function):
    """f(g) ∘ u for any f; keeps g and u."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.function = function
        return function(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            twin = second.gradients(lambda g, u: ctx.function(g) * u, (gate, up), ctx.needs_input_grad[:2], grads[0])
            return *twin, None
        if gpu.serves(gate):
            from inlay.kernels.gpu import gated as kernel

            if kind := kernel.known(ctx.function):
                return *kernel.backward(grads[0], gate, up, kind), None
        with torch.enable_grad():
            inside = gate.detach().requires_grad_()
            opened = ctx.function(inside)
        (d_gate,) = torch.autograd.grad(opened, inside, grads[0] * up)
        return d_gate, grads[0] * opened.detach(), None


def is_gated(module: nn.Module, view: ModelView) -> bool:
    """A module made of the four children and nothing that is called beside them."""
    return module._modules.keys() >= set(CHILDREN) and all(module._modules[n] is not None for n in CHILDREN)
