"""Initialisation from data: what a method looks at before its pieces are built.

`attach(model, method, data=batches)` runs `Method.measure` first. It may run the frozen base over the batches
and returns the method, with what was found out about sizes filled in, and initial values by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from inlay.core.contracts.method import Batches, Method
from inlay.core.errors import ConfigError
from inlay.core.forward.roster import bare


def check_data(method: Method, data: Batches | None) -> None:
    """Raise unless data was given exactly where the method needs some."""
    if method.needs_data and data is None:
        raise ConfigError(
            f"method {method.name!r} is initialised from data: call attach(model, method, data=batches) with an "
            "iterable of keyword arguments for the model's forward"
        )
    if data is not None and not method.needs_data:
        raise ConfigError(f"method {method.name!r} is not initialised from data; leave `data` out")


def observe_inputs(
    model: nn.Module, modules: Sequence[nn.Module], data: Batches, see: Callable[[int, Tensor], None]
) -> int:
    """Run the base over the batches and show what enters each module.

    Args:
        see: called with the module's place in `modules` and its input, (..., in).

    Returns:
        The number of batches.
    """
    hooks = [m.register_forward_pre_hook(lambda _, args, i=i: see(i, args[0].detach())) for i, m in enumerate(modules)]
    count = 0
    # An encoder–decoder makes its decoder's input from the labels; elsewhere they would only cost a loss.
    needs_labels = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    try:
        with bare(model), torch.no_grad():
            for batch in data:
                model(**{k: v for k, v in batch.items() if needs_labels or k != "labels"})
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise ConfigError("`data` holds no batches")
    return count
