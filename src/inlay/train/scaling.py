"""Training in fp16: losses are scaled up, so that small gradients are not lost, and steps that overflow are left out.

    loss ─ · scale ─▶ backward ─ / scale ─▶ clipping ─▶ finite? ─ yes ─▶ optimizer, clocks, schedule
                                                           └── no ──▶ nothing, and half the scale

What the adapters hold is float32, and so are its gradients; float16 is what passes through the base. There is no
autocast: the base's weights are float16 themselves, and adapters compute in what they meet, as beside bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

# Gradients of losses near one are far below 8 (65,504 / 2^13), and a lost first step is a share of a short run; what
# is still lost at 2^13 is smaller than 1e-11.
FIRST = 2.0**13
FACTOR = 0.5  # by which an overflow lowers the scale
LEAST = 1.0  # at which gradients overflow that no scale has enlarged: the base itself leaves float16's range


class Scaling(TrainerCallback):
    """Scales the losses of a run, in effect from the moment it is made.

    Args:
        accelerator: `accelerate`'s, that has prepared no optimizer yet.
        skipped: called for every step that is left out.
    """

    def __init__(self, accelerator: Any, skipped: Callable[[], None]) -> None:
        self.accelerator, self.skipped = accelerator, skipped
        self.optimizer: Any = None  # accelerate's, around the one that steps
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=FIRST, backoff_factor=FACTOR)
        accelerator.unscale_gradients = self._unscale  # its own acts under its autocast only

    def _unscale(self, optimizer: Any = None) -> None:
        """Before gradients are clipped or measured, once a step."""
        self.accelerator.scaler.unscale_(self.optimizer.optimizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = kwargs["optimizer"]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.accelerator.optimizer_step_was_skipped:
            return
        self.skipped()
        if self.accelerator.scaler.get_scale() < LEAST:
            from inlay.train.trainer import diverged

            raise diverged(f"gradients overflow float16 at step {state.global_step + 1}, however small they are scaled")
