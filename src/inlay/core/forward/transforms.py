"""Whether operations run as they stand: fast paths leave what torch rewrites, or hooks watch, to their naive twins."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def transformed() -> bool:
    """Whether a compiler traces, or what runs is under `torch.func` or forward differentiation, which our autograd
    functions have no rules for; what is computed there is not kept, either."""
    return (
        torch.compiler.is_compiling()  # first, so that a compiler asks no further
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def watched(module: nn.Module) -> bool:
    """Whether a module has hooks, which must see its call once and with its graph."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
