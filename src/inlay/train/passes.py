"""Micro-batches ("passes") that get smaller when memory runs out.

The rows of a step and their weights in its loss do not depend on how the step is divided into passes
(`AdapterTrainer.compute_loss`). So if a pass runs out of memory, the step's gradients so far are dropped, the random
state of its start is restored, and the step is repeated in passes of half the rows; all later passes have that size
too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from inlay.core.errors import ConfigError

Made = TypeVar("Made")
Batch = dict[str, Any]
# Torch's messages when a CPU has no more memory, for which it has no error class.
SAID = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "out of memory")


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


class Passes:
    """Runs batches, whole or in parts.

    Args:
        discard: drops what a failed step has left behind.
        told: called with the new number of rows when it has changed.

    Attributes:
        rows: most rows of a pass; None until memory runs out.
    """

    def __init__(self, *, discard: Callable[[], None], told: Callable[[int], None]) -> None:
        self.discard, self.told = discard, told
        self.rows: int | None = None
        self.done: list[Batch] = []
        self.state: list[Tensor] = []

    def begin(self) -> None:
        """Begin a step; all batches until the next call belong to it."""
        self.done, self.state = [], _random_state()

    def run(self, batch: Batch, do: Callable[[Batch], Made]) -> list[Made]:
        """Call `do` with each part of the next batch of the step, and return the results.

        Raises:
            ConfigError: not even one row fits into memory.
        """
        self.done.append(batch)
        made = self._attempt([batch], do)
        while made is None:
            self._shrink(batch)
            self.discard()
            _set_random_state(self.state)
            made = self._attempt(self.done, do)
        return made

    def _attempt(self, batches: list[Batch], do: Callable[[Batch], Made]) -> list[Made] | None:
        """The results of `do` for the last batch; None if memory ran out, and then nothing refers to them."""
        made: list[Made] = []
        try:
            for batch in batches:
                made = [do(part) for part in parts(batch, self.rows)]
        except Exception as error:
            if not ran_out(error):
                raise
            return None
        return made

    def _shrink(self, batch: Batch) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        count = max(len(starts(b)) for b in (*self.done, batch))
        size = count if self.rows is None else min(count, self.rows)
        if size <= 1:
            raise ConfigError(
                "out of memory with one row a pass. Give --gradient-checkpointing, a smaller --max-length or a smaller "
                "base, and --overwrite"
            )
        self.rows = (size + 1) // 2
        self.told(self.rows)


def parts(batch: Batch, rows: int | None) -> Iterator[Batch]:
    """The batch in parts of at most so many rows; None does not divide it."""
    begin = starts(batch)
    if rows is None or len(begin) <= rows:
        yield batch
        return
    packed = "position_ids" in batch
    size = int(batch["labels"].shape[1 if packed else 0])
    for at in range(0, len(begin), rows):
        part = slice(begin[at], begin[at + rows] if at + rows < len(begin) else size)
        where = (slice(None), part) if packed else (part,)
        yield {k: v[where] if isinstance(v, Tensor) and v.shape[len(where) - 1 : len(where)] == (size,) else v
               for k, v in batch.items()}  # fmt: skip


def starts(batch: Batch) -> list[int]:
    """Where each row begins: its number, or its first token if rows are packed."""
    if "position_ids" in batch:
        return [int(i) for i in (batch["position_ids"][0] == 0).nonzero().squeeze(1)]
    return list(range(len(batch["labels"])))


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
