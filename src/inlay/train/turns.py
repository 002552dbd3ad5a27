"""Several threads of which one runs at a time, each with the process's random numbers to itself.

Threads are used for their stacks, not for speed: a training loop that somebody else wrote can so be left between two
steps and gone on with later. Whatever such a loop keeps in the process instead of in itself is put away when its
turn ends and put back when the next begins: the random states, and accelerate's state of the gradients.

    order      0 1           1 0           0 1          1
    thread 0   ═══ pass_on ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ ═══ leave          ═ runs   ┄ waits in `take`
    thread 1   ┄┄┄┄┄┄┄┄┄┄┄┄┄ ═══ pass_on ┄┄┄┄┄┄┄┄┄┄┄┄ ═══
    in force   ambient 0     ambient 1     ambient 0    ambient 1

The first of `order` runs and all others wait, so nothing else here needs a lock. What is in force belongs to the one
who runs; `ambient` holds that of each of the others. Who has taken a turn must leave in a turn of its own, whatever it
raises, or the others wait for ever (`several.py`, `_run`).
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
    """What a training loop keeps in the process."""

    numpy: Any
    python: Any
    torch: Any
    devices: Any
    gradients: dict[str, Any]

    @classmethod
    def now(cls) -> Ambient:
        """What is in force."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        return cls(np.random.get_state(), random.getstate(), torch.get_rng_state(), devices, dict(gradient_state()))

    def restore(self) -> None:
        """Put it in force again."""
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.devices is not None:
            torch.cuda.set_rng_state_all(self.devices)
        state = gradient_state()
        state.clear()
        state.update(self.gradients)


class Turns:
    """Who may run: each in turn, until it leaves.

    Args:
        ambient: of each thread, before its first turn.
    """

    def __init__(self, ambient: list[Ambient]) -> None:
        self.ambient = dict(enumerate(ambient))
        self.order = list(self.ambient)
        self.changed = threading.Condition()

    def take(self, me: int) -> None:
        """Wait for one's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.order[0] == me)
        self.ambient[me].restore()

    def pass_on(self, me: int) -> None:
        """Let all others have a turn."""
        if len(self.order) == 1:
            return
        self.ambient[me] = Ambient.now()
        with self.changed:
            self.order.append(self.order.pop(0))
            self.changed.notify_all()
        self.take(me)

    def leave(self) -> None:
        """Have no turn any more; called in one's last."""
        with self.changed:
            self.order.pop(0)
            self.changed.notify_all()
