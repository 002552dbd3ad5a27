"""Passes that are cut smaller when memory runs out.

A step's rows, and what each of them weighs in its loss, do not depend on how the step is cut into passes
(`AdapterTrainer.compute_loss`). So when a pass breaks, the step's gradients so far are dropped, the random numbers
are put back to where it began, and all of it is done again in passes of half the rows, as is everything after it.
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
# What torch says when the system gives it no more memory on a CPU, where it has no error class for that.
SAID = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "out of memory")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no more memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


class Passes:
    """Runs batches, whole or in parts.

    Args:
        discard: drops what a broken step has left behind.
        told: called with the new number of rows when it has changed.

    Attributes:
        rows: that a pass may have; None as long as all went well.
    """

    def __init__(self, *, discard: Callable[[], None], told: Callable[[int], None]) -> None:
        self.discard, self.told = discard, told
        self.rows: int | None = None
        self.done: list[Batch] = []
        self.state: list[Tensor] = []

    def begin(self) -> None:
        """A step begins; until the next one, all batches belong to it."""
        self.done, self.state = [], _random_state()

    def run(self, batch: Batch, do: Callable[[Batch], Made]) -> list[Made]:
        """What `do` makes of each part of the batch, which is the next of its step.

        Raises:
            ConfigError: not even one row fits.
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
        """What `do` makes of the last batch; None where memory ran out, and nothing holds on to what was made."""
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
    """The batch in runs of at most so many rows; whole where None."""
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
    """Where each row begins: its number, or its first token where rows are packed behind one another."""
    if "position_ids" in batch:
        return [int(i) for i in (batch["position_ids"][0] == 0).nonzero().squeeze(1)]
    return list(range(len(batch["labels"])))


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
