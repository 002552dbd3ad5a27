"""Whether torch runs operations as written: fast paths leave what it rewrites, or hooks watch, to the plain code."""

from __future__ import annotations

from torch import nn

from inlay.core.upstream import has_any_global_hook, transformed

__all__ = ["transformed", "watched"]


def watched(module: nn.Module) -> bool:
    """Whether a module has hooks, which must see it called exactly once, with its graph."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_any_global_hook()
    )
