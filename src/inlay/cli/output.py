"""What commands print: JSON for programs on standard output, tables for people."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table

UNBOUNDED = 10_000  # columns: what a table would take is measured where nothing is in its way


def write_json(data: Any) -> None:
    """One JSON document on standard output; numbers that JSON does not know (nan, infinity) become null."""
    sys.stdout.write(json.dumps(_finite(data), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    numbers: Sequence[str] = (),
    wrapped: Sequence[str] | None = None,
    lesser: Sequence[str] = (),
) -> None:
    """A table on standard output.

    Args:
        numbers: columns that hold numbers, which stand to the right.
        wrapped: columns that may break lines where the terminal is narrow; None is all.
        lesser: columns that are left out where there is no room for all, in this order, and said to be.
    """
    from rich.console import Console

    console = Console()
    unbounded = console.options.update(width=UNBOUNDED)
    for count in range(len(lesser) + 1):
        shown = [name for name in columns if name not in lesser[:count]]
        cells = [[cell for name, cell in zip(columns, row, strict=True) if name in shown] for row in rows]
        table = _table(title, shown, cells, numbers, wrapped)
        if console.measure(table, options=unbounded).maximum <= console.width:
            break
    console.print(table)
    if count:
        console.print(f"(without {', '.join(lesser[:count])}: the terminal is narrow)")


def _table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    numbers: Sequence[str],
    wrapped: Sequence[str] | None,
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold", show_header=any(columns))
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in numbers else "left",
            overflow="fold",
            no_wrap=wrapped is not None and name not in wrapped,
        )
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    return table


def printable(text: str) -> str:
    """Text from a file, its control characters spelt out: a terminal acts on them."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number(value: float, digits: int = 4) -> str:
    """A score for people: ``undefined`` for nan."""
    if math.isnan(value):
        return "undefined"
    return f"{value:,.{digits}f}" if math.isfinite(value) else "infinite"


def errors_console() -> Console:
    """Where progress goes, so that standard output stays for results."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def stages(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage of a task; nothing when quiet or when nobody watches.

    Yields:
        A function of the stage's name, the steps done, and all steps.
    """
    console = errors_console()
    if quiet or not console.is_terminal:
        yield lambda stage, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        known: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in known:
                known[stage] = bars.add_task(stage, total=total)
            bars.update(known[stage], completed=done, total=total)

        yield report


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value
