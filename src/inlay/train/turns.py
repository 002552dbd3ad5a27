"""Threads that take turns: only one runs at a time, each with its own view of the process's random state.

Threads are used for their stacks, not for speed: they make it possible to leave another library's training loop between
two steps and to continue it later. State that such a loop keeps in the process is saved when its turn ends and restored
when its next one begins: the random states, and accelerate's gradient state.

    order      0 1           1 0           0 1          1
    thread 0   ═══ pass_on ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ ═══ leave          ═ runs   ┄ waits in `take`
    thread 1   ┄┄┄┄┄┄┄┄┄┄┄┄┄ ═══ pass_on ┄┄┄┄┄┄┄┄┄┄┄┄ ═══
    in force   ambient 0     ambient 1     ambient 0    ambient 1

The first thread in `order` runs and all others wait, so nothing else here needs a lock. The state in force belongs to
the running thread; `ambient` holds the state of each of the others. A thread that has taken a turn must call `leave` in
a turn of its own, whatever it raises, or the others wait for ever (`several.py`, `_run`).
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from inlay.core.upstream import gradient_state


@dataclass
class Ambient:
    """State that a training loop keeps in the process."""

    numpy: Any
    python: Any
    torch: Any
    devices: Any
    gradients: dict[str, Any]

    @classmethod
    def now(cls) -> Ambient:
        """The state in force."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        return cls(np.random.get_state(), random.getstate(), torch.get_rng_state(), devices, dict(gradient_state()))

    def restore(self) -> None:
        """Restore this state."""
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.devices is not None:
            torch.cuda.set_rng_state_all(self.devices)
        state = gradient_state()
        state.clear()
        state.update(self.gradients)


class Turns:
    """Decides which thread may run: each in turn, until it leaves.

    Args:
        ambient: the state of each thread before its first turn.
    """

    def __init__(self, ambient: list[Ambient]) -> None:
        self.ambient = dict(enumerate(ambient))
        self.order = list(self.ambient)
        self.changed = threading.Condition()

    def take(self, me: int) -> None:
        """Wait for this thread's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.order[0] == me)
        self.ambient[me].restore()

    def pass_on(self, me: int) -> None:
        """Let all others take a turn."""
        if len(self.order) == 1:
            return
        self.ambient[me] = Ambient.now()
        with self.changed:
            self.order.append(self.order.pop(0))
            self.changed.notify_all()
        self.take(me)

    def leave(self) -> None:
        """Take no more turns; called in the last one."""
        with self.changed:
            self.order.pop(0)
            self.changed.notify_all()
