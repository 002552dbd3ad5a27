"""Shared by methods with a schedule: the number of steps made, stored with the adapter, and the run's length."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.authoring import Adapter, ConfigError, DeltaPiece, Piece, PromptPiece, Shared

SCHEDULE = "schedule"  # the key under which the counter is stored


class Steps(Shared):
    """Optimizer steps made so far. A buffer, so that a resumed run continues counting."""

    done: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__(SCHEDULE)
        self.register_buffer("done", torch.zeros((), dtype=torch.int64, device=device))

    def advance(self) -> int:
        """Count one more step; returns its number, from 1."""
        self.done.add_(1)
        return int(self.done)


def counted(pieces: list[Piece], over: object) -> list[Piece]:
    """The pieces with a shared counter as their child `steps`, unless the schedule is over."""
    modules = [p.delta if isinstance(p, DeltaPiece) else p.difference for p in pieces if not isinstance(p, PromptPiece)]
    if modules and not over:
        steps = Steps(next(modules[0].parameters()).device)
        for module in modules:
            module.steps = steps
    return pieces


def steps_of(adapter: Adapter) -> int | None:
    """How many steps the adapter has made; None if it does not count."""
    done = adapter.tensors().get(f"shared/{SCHEDULE}/done")
    return None if done is None else int(done)


def length_of_run(name: str, total_steps: int | None, least: int) -> int:
    """`total_steps`, or an error that says how to give them.

    Args:
        least: how many steps the schedule needs.
    """
    if total_steps is None:
        raise ConfigError(
            f"method {name!r} follows a schedule over the whole run and needs the run's length; give total_steps="
            "<number of optimizer steps> (`inlay train` fills it in)"
        )
    if total_steps < least:
        raise ConfigError(f"method {name!r}: total_steps is {total_steps}, but its schedule needs at least {least}")
    return total_steps


def forget(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Drop the optimizer's state for these parameters, which start anew."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
