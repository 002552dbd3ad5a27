"""Reporting progress: a stage of work counts finished rows, and a callback gets the sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Callback: (what is being done, rows finished, all rows)."""

Advance: TypeAlias = Callable[[int], None]
"""Callback: (number of rows just finished)."""


def counting(report: Progress | None, stage: str, total: int) -> Advance | None:
    """A callback for a stage of `total` rows, which adds up and calls `report`; None if `report` is None."""
    if report is None:
        return None
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        report(stage, done, total)

    return advance
