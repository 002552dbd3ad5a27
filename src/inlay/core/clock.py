"""What a method does around every optimizer step, in whatever loop the steps are made.

A budget that shrinks (AdaLoRA), a rank drawn anew (DyLoRA), a mask found half way (LT-SFT), a regulariser: each
needs to know that a step is about to be made or was made. PyTorch tells so of every optimizer, so nobody has to
call anything: plain loops, `transformers.Trainer` and TRL's trainers all keep the schedule.

    backward ─▶ before_step (weights and gradients of this step) ─▶ optimizer.step ─▶ after_step (new weights)

Counters and averages belong in buffers (of a `Shared` child, for one), so that they are stored, and a resumed
run goes on where it stopped.
"""

from __future__ import annotations

import weakref
from abc import ABC
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from inlay.core.adapter import Adapter


class Clock(ABC):  # noqa: B024
    """Told of the steps of every optimizer that holds trainable parameters of its adapter. Abstract.

    Hyper-parameters are read from ``self.adapter.method`` when they are needed: a training run may fill in
    the number of steps (`Method.for_steps`) after attaching.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        _keep(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a deep copy has steps of its own
        _keep(self)

    def before_step(self, optimizer: Optimizer) -> None:  # noqa: B027 - either half may be left out
        """Gradients are complete; they may be read and changed, and so may the step be refused by raising."""

    def after_step(self, optimizer: Optimizer) -> None:  # noqa: B027
        """The parameters have their new values; they may be changed in place, under no_grad."""


_CLOCKS: weakref.WeakSet[Clock] = weakref.WeakSet()
_hooks: list[Any] = []


def _keep(clock: Clock) -> None:
    _CLOCKS.add(clock)
    if not _hooks:  # a process without clocks pays nothing for them
        _hooks.append(register_optimizer_step_pre_hook(lambda optimizer, *_: _tell(optimizer, "before_step")))
        _hooks.append(register_optimizer_step_post_hook(lambda optimizer, *_: _tell(optimizer, "after_step")))


def _tell(optimizer: Optimizer, what: str) -> None:
    clocks = list(_CLOCKS)
    if not clocks:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for clock in clocks:
        if any(p.requires_grad and id(p) in held for p in clock.adapter.parameters()):
            getattr(clock, what)(optimizer)
