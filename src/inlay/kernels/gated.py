"""A gated feed-forward that stores the outputs of its first two matrices, and nothing computed from them.

    h = f(g) ∘ u,   g = gate(x),   u = up(x),   y = down(h)

Models store f(g) as well; here the backward pass computes it again, which takes one pass over g. This runs in modules
with the children `gate_proj`, `up_proj`, `down_proj` and `act_fn`, if their own forward gives the same when tried.
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
from inlay.kernels import gpu, second_derivatives

CHILDREN = ("gate_proj", "up_proj", "down_proj", "act_fn")
# Module → whether its forward is that of the formula.
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
    """Whether gradients are needed, inside or for x, and nobody trains the nonlinearity or has hooks on it."""
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
    """Whether the module's own forward gives exactly the formula's result; the trial leaves no trace."""
    outs = []
    with torch.no_grad():
        for way in (inner, functools.partial(compute, module)):
            with torch.random.fork_rng():
                torch.manual_seed(0)  # the same dropout masks in both
                outs.append(way(x.detach()))
    return type(outs[0]) is Tensor and torch.equal(*outs)


class Gate(torch.autograd.Function):
    """f(g) ∘ u for any f; stores g and u."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.function = function
        return function(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            twin = second_derivatives.gradients(
                lambda g, u: ctx.function(g) * u, (gate, up), ctx.needs_input_grad[:2], grads[0]
            )
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
    """Whether a module consists of the four children and calls nothing else."""
    return module._modules.keys() >= set(CHILDREN) and all(module._modules[n] is not None for n in CHILDREN)
