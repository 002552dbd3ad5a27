"""Initialisation from data: what a method looks at before its pieces are built.

`attach(model, method, data=batches)` calls `Method.measure` first. It may run the frozen base over the batches, and
returns the method with the sizes it found filled in, and initial values for the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from inlay.core.contracts.method import Batches, Method
from inlay.core.errors import ConfigError
from inlay.core.forward.active_adapters import bare


def check_data(method: Method, data: Batches | None) -> None:
    """Raise if data is missing that the method needs, or is given to a method that needs none."""
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
    """Run the base over the batches and pass what enters each module to `see`.

    Args:
        see: called with the module's index in `modules` and its input, (..., in).

    Returns:
        The number of batches.
    """
    hooks = [m.register_forward_pre_hook(lambda _, args, i=i: see(i, args[0].detach())) for i, m in enumerate(modules)]
    count = 0
    # An encoder–decoder makes its decoder's input from the labels; elsewhere they would only cause a loss to be
    # computed.
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
