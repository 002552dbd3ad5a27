"""The base's own dropout, with masks that are drawn faster and never stored.

    y = x ∘ m / (1 − p),   m ~ Bernoulli(1 − p)        dx = dy ∘ m / (1 − p)

On a CPU `F.dropout` takes 6 ns for each entry, which in small encoders is a tenth of the step, and stores its mask in
the dtype of x. Here the dropped entries are drawn from a seed (`masks.py`) and drawn again for the backward pass. For
the same seed the masks differ from those of `F.dropout`, but their distribution is the same, so `F.dropout` is the
twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.forward.host import Host
from inlay.core.forward.transforms import transformed
from inlay.core.model.view import ModelView
from inlay.kernels.masks import MOST, drawn, fresh_seed, without_

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def dropout(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A dropout module's forward."""
    module: Any = host.module
    x: Any = args[0] if args else None
    if len(args) != 1 or kwargs or not applies(module, x):
        return inner(*args, **kwargs)
    return Dropout.apply(x, module.p, fresh_seed())  # type: ignore[no-untyped-call]


def applies(module: Any, x: Any) -> bool:
    """Whether entries are dropped on a CPU, outside of a compiler. Meta tensors count as on a CPU."""
    return (
        not transformed()
        and module.training
        and not module.inplace
        and 0 < module.p <= MOST
        and type(x) is Tensor
        and x.is_floating_point()
        and x.device.type in ("cpu", "meta")
    )


class Dropout(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, seed: int) -> Tensor:
        ctx.share, ctx.seed = share, seed
        return _kept(x, share, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # the backward pass is itself differentiated
            return Dropout.apply(grads[0], ctx.share, ctx.seed), None, None  # type: ignore[no-untyped-call]
        return _kept(grads[0], ctx.share, ctx.seed), None, None


def _kept(x: Tensor, share: float, seed: int) -> Tensor:
    return without_((x * (1 / (1 - share))).contiguous(), drawn(x.numel(), seed, share))


def is_dropout(module: nn.Module, view: ModelView) -> bool:
    """Whether it is exactly torch's class: a subclass may compute anything."""
    return type(module) is nn.Dropout
