"""Second derivatives of a fast path, computed by its naive twin.

A backward pass that is itself differentiated (``create_graph=True``: gradient penalties, products with a Hessian) must
not use what a forward stored without its graph: the numbers would be wrong without any error. There the twin is
computed and differentiated instead; if too little was stored for that, an error says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inlay.core.errors import UnsupportedError


def gradients(
    twin: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``twin(*inputs)`` with their graph; None for inputs that need none.

    Args:
        grad: the gradient with respect to the twin's result.
    """
    if not any(wanted):  # nothing that is trained depends on these inputs
        return (None,) * len(wanted)
    with torch.enable_grad():
        own = [x.view_as(x) for x in inputs]  # separate, even if one input was computed from another
        out = twin(*own)
    chosen = [x for x, needed in zip(own, wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(out, chosen, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in wanted)


def refuse(what: str, instead: str) -> None:
    """Raise if a backward pass is to be differentiated that contains `what`."""
    if torch.is_grad_enabled():
        raise UnsupportedError(f"second derivatives do not pass through {what}: {instead}")
