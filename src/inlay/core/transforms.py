"""Whether operations run as they stand: fast paths leave what torch rewrites to their naive twins."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a compiler traces, or what runs is under `torch.func` or forward differentiation, which our autograd
    functions have no rules for; what is computed there is not kept, either."""
    return (
        torch.compiler.is_compiling()  # first, so that a compiler asks no further
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
