"""Whether torch runs operations as written: fast paths leave what it rewrites, or hooks watch, to the plain code."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def transformed() -> bool:
    """Whether a compiler traces, or the code runs under `torch.func` or forward differentiation, for which our autograd
    functions have no rules. What is computed there must not be cached either."""
    return (
        torch.compiler.is_compiling()  # first, so that a compiler does not trace the rest
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def watched(module: nn.Module) -> bool:
    """Whether a module has hooks, which must see it called exactly once, with its graph."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
