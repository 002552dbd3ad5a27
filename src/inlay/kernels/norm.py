"""RMS norms that store nothing but their input for the backward pass.

    y = w ∘ x · r,   r = (mean(x²) + ε)^(−1/2)          dx = r · (g − x · r² · mean(g ∘ x)),   g = w ∘ dy

Models compute these norms as a chain of float32 operations, which stores two float32 copies of x. Here the forward pass
is the model's own, bit for bit, without a graph, and the backward pass is the formula. It is used for modules that are
named like a norm and whose own backward pass gives the same for their first input (their weight is w or 1 + w).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.forward.host import Host
from inlay.core.forward.transforms import transformed
from inlay.core.model.view import ModelView
from inlay.kernels import gpu, second_derivatives

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative to the gradient's norm
# Norm → ε and the offset of its weight; None if the formula does not fit it.
_SEEN: weakref.WeakKeyDictionary[nn.Module, tuple[float, float] | None] = weakref.WeakKeyDictionary()


def norm(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A norm's forward."""
    module: Any = host.module
    x: Any = args[0] if args else None
    if len(args) != 1 or kwargs or not applies(host, x):
        return inner(*args, **kwargs)
    if module not in _SEEN:
        _SEEN[module] = _formula(module, inner, x)
    found = _SEEN[module]
    return inner(x) if found is None else RootMeanSquare.apply(x, module.weight, *found, inner)  # type: ignore[no-untyped-call]


def applies(host: Host, x: Any) -> bool:
    """Whether a gradient is needed for x only, and nothing changes the weight."""
    return (
        not transformed()
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and x.requires_grad
        and x.dtype in AGREEMENT
        and not torch.is_autocast_enabled(x.device.type)
        and not host.replaced
        and type(weight := host.module._parameters.get("weight")) is nn.Parameter  # not computed by something
        and not weight.requires_grad
    )


def _formula(module: nn.Module, inner: Callable[..., Any], x: Tensor) -> tuple[float, float] | None:
    """The ε and offset for which the formula gives this norm's gradient, found by a trial that leaves no trace."""
    epsilon: Any = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), 0.0)
    weight, tried = module._parameters["weight"], x.detach().requires_grad_()
    assert weight is not None, "`is_norm` looks for one"
    if not isinstance(epsilon, float) or weight.shape != x.shape[-1:] or weight.dtype not in AGREEMENT:
        return None
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        out = inner(tried)
        if type(out) is not Tensor or out.shape != x.shape or not out.requires_grad:
            return None
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype).to(out.device)
        (expected,) = torch.autograd.grad(out, tried, grad)
    for offset in (0.0, 1.0):
        found = gradient(grad, x.detach(), weight, epsilon, offset)
        if float((found - expected).float().norm()) <= AGREEMENT[x.dtype] * float(expected.float().norm()):
            return epsilon, offset
    return None


def gradient(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    """The gradient with respect to x: (…, features), in its dtype; sums are in float32."""
    if gpu.serves(x):
        from inlay.kernels.gpu import norm as kernel

        return kernel.gradient(grad, x, weight, epsilon, offset)
    wide = x.float()
    scale = weight.float() + offset if offset else weight
    g = (grad * scale).float() if scale.dtype == grad.dtype else grad.float() * scale
    features = x.shape[-1]
    r = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    share = (g * wide).sum(-1, keepdim=True).mul_(r.pow(3)).div_(-features)
    return g.mul_(r).addcmul_(wide, share).to(x.dtype)


class RootMeanSquare(torch.autograd.Function):
    """Described at the top of this file."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float, inner: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.formula, ctx.inner = (epsilon, offset), inner
        return inner(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *second_derivatives.gradients(ctx.inner, (x,), (True,), grads[0]), None, None, None, None
        return gradient(grads[0], x, weight, *ctx.formula), None, None, None, None


def is_norm(module: nn.Module, view: ModelView) -> bool:
    """Whether a module is a norm with only a weight vector. (torch's layer norm is a single kernel already.)"""
    weight = module._parameters.get("weight")
    return (
        type(module).__name__.endswith("Norm")
        and not isinstance(module, nn.LayerNorm)
        and weight is not None
        and weight.dim() == 1
        and sum(p is not None for p in module._parameters.values()) == 1
        and not module._modules
    )
