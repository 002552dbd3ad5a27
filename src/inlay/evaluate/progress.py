"""How far a stage of work is: who does it counts what is finished, who shows it is told the sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told what is being done, the rows that are finished, and all rows."""

Advance: TypeAlias = Callable[[int], None]
"""Told how many rows were just finished."""


def counting(report: Progress | None, stage: str, total: int) -> Advance | None:
    """What a stage of `total` rows calls as it goes on, for who wants `report`."""
    if report is None:
        return None
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        report(stage, done, total)

    return advance
