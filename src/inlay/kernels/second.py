"""Second derivatives of a fast path are those of its naive twin.

A backward pass that is itself differentiated (``create_graph=True``: penalties of gradients, products with a Hessian)
must not use what a forward kept without its graph: nothing would complain, and the numbers would be wrong. There the
twin is computed and differentiated instead; where too little was kept for that, an error says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inlay.core.errors import UnsupportedError


def gradients(
    twin: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``twin(*inputs)`` with their graph, None where none is wanted.

    Args:
        grad: with respect to what the twin returns.
    """
    if not any(wanted):  # what is trained lies elsewhere, and its gradient passes by
        return (None,) * len(wanted)
    with torch.enable_grad():
        own = [x.view_as(x) for x in inputs]  # one may have been made of another; that is not this gradient's matter
        out = twin(*own)
    chosen = [x for x, needed in zip(own, wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(out, chosen, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in wanted)


def refuse(what: str, instead: str) -> None:
    """Raise in a backward pass that is to be differentiated, where `what` cannot be."""
    if torch.is_grad_enabled():
        raise UnsupportedError(f"second derivatives do not pass through {what}: {instead}")
