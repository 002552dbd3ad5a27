"""Loops whose rounds are alike, and who need not go through all of them.

A kernel that works through its operands a part at a time makes the same tensors in every round and lets go of them. A
plan (`inlay.plan`) runs kernels on tensors without values, where only shapes and sizes come out: it goes through a few
rounds and works out the work of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHORTENED: ContextVar[Callable[[range], Iterable[int]] | None] = ContextVar("inlay_shortened", default=None)


def alike(rounds: range) -> Iterable[int]:
    """The rounds of a loop: after a first that sets up each needs as much memory as the one before, or less, and as
    much work, or evenly less; the last may have less to do than its turn."""
    shortened = _SHORTENED.get()
    return rounds if shortened is None else shortened(rounds)


@contextmanager
def shortening(by: Callable[[range], Iterable[int]]) -> Iterator[None]:
    """While loops go through the rounds that `by` chooses; results are then those of no full loop."""
    token = _SHORTENED.set(by)
    try:
        yield
    finally:
        _SHORTENED.reset(token)
