"""What people read: tables, lists of facts and values, in whole words at any width of the terminal.

show_table   things of one kind, a row each; too narrow a terminal costs columns, then lines, never parts of words
show_facts   one thing, a line a fact
show_text    a paragraph
told         one value
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence

import typer

APART = 2  # columns between the names and the values of a list
BREAKS_BEHIND = re.compile(r"(?<=[/._,:=-])")  # in what is too long for a line and has no spaces: paths, names
SHORTEST = 8  # that a column of text is made: below, a list is easier to read


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    numbers: Sequence[str] = (),
    whole: Sequence[str] = (),
    lesser: Sequence[str] = (),
) -> None:
    """A table on standard output; where even its most needed columns are too wide, a list for each row.

    Args:
        numbers: columns that stand to the right, and whose cells are never broken.
        whole: columns of words whose cells are never broken either; those of all others may be, between words.
        lesser: columns that are left out where there is no room for all, in this order, and said to be.
    """
    cells = [[told(cell) for cell in row] for row in rows]
    for count in range(len(lesser) + 1):
        kept = [at for at, name in enumerate(columns) if name not in lesser[:count]]
        shown = [[row[at] for at in kept] for row in cells]
        names = [columns[at] for at in kept]
        fixed = [name in numbers or name in whole for name in names]
        widths = _fitted([names, *shown], fixed, _width() - 3 * len(kept) - 1)
        if widths is not None:
            break
    _heading(title)
    if widths is None:
        _show_lists(columns, cells)
        return
    _print_table(names, shown, widths, [name in numbers for name in names])
    if count:
        show_text(f"(without {', '.join(lesser[:count])}: the terminal is narrow)")


def show_facts(title: str, facts: Mapping[str, object]) -> None:
    """A line a fact on standard output, as ``name  value``; values break between words."""
    rows = [[_name(name), told(value)] for name, value in facts.items()]
    names = max((_length(name) for name, _ in rows), default=0)
    _heading(title)
    room = max(SHORTEST, _width() - names - 7)
    _print_table(None, rows, [names, min(room, max((_widest(value) for _, value in rows), default=0))], [False, False])


def show_text(text: str) -> None:
    """A paragraph on standard output, broken between words."""
    for line in lines_of(printable(text), _width()):
        typer.echo(line)


# -- values ----------------------------------------------------------------------------------------


def told(value: object) -> str:
    """A value as people write it: no quotes, brackets or names of Python's."""
    match value:
        case None | "" | () | []:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return told_number(value)
        case str():
            return printable(value)
        case {"method": str(name), **settings}:
            return f"{name} ({told(settings)})" if settings else name
        case Mapping():
            return ", ".join(f"{_name(str(key))} {told(item)}" for key, item in value.items()) or "none"
        case Sequence() | set() | frozenset():
            return ", ".join(map(told, value))
    return printable(str(value))


def told_number(value: float, digits: int | None = None) -> str:
    """A number with separators; in four significant digits where nothing is said.

    Args:
        digits: behind the point.
    """
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else "infinite"
    if digits is not None:
        return f"{value:,.{digits}f}"
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def printable(text: str) -> str:
    """Text from a file, its control characters spelt out: a terminal acts on them."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _name(key: str) -> str:
    return printable(key).replace("_", " ")


# -- layout ----------------------------------------------------------------------------------------


def _width() -> int:
    return shutil.get_terminal_size().columns


def _heading(title: str) -> None:
    """Over the whole width, however narrow what follows is."""
    for line in lines_of(printable(title), _width()):
        typer.echo(typer.style(line, bold=True))


def _length(text: str) -> int:
    """Columns on the terminal."""
    from rich.text import Text

    return len(text) if text.isascii() else Text(text).cell_len


def _widest(text: str) -> int:
    return max(map(_length, text.splitlines()), default=0)


def _fitted(rows: Sequence[Sequence[str]], fixed: Sequence[bool], room: int) -> list[int] | None:
    """How wide each column gets; None where whole words do not fit into the room.

    Args:
        rows: the names in front.
        fixed: whether a column's cells are kept on one line; its name may still break.
    """
    widths = [
        max([*map(_widest, cells), *map(_length, name.split())]) if keep else max(map(_widest, (name, *cells)))
        for keep, (name, *cells) in zip(fixed, zip(*rows, strict=True), strict=True)
    ]
    least = [
        width if keep else min(width, max(SHORTEST, *(_length(p) for cell in column for p in _pieces(cell))))
        for width, keep, column in zip(widths, fixed, zip(*rows, strict=True), strict=True)
    ]
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max((at for at in range(len(widths)) if widths[at] > least[at]), key=lambda at: widths[at])
        widths[widest] -= 1
    return widths


def _pieces(text: str) -> Iterator[str]:
    """The parts of a text that stay on one line."""
    for word in text.split():
        yield from BREAKS_BEHIND.split(word)


def lines_of(text: str, width: int) -> list[str]:
    """A text in lines: broken between words, in words that are longer than a line behind a ``/`` or the like."""
    made: list[str] = []
    for line in text.splitlines():
        begun = ""
        for word in re.findall(r"\s*\S+", line):
            if _length(begun + word) <= width:
                begun += word
                continue
            made += [begun] if begun else []
            *full, begun = _broken(word.strip(), width)
            made += full
        made.append(begun)
    return made or [""]


def _broken(word: str, width: int) -> list[str]:
    """A word in lines, as few as there must be."""
    made = [""]
    for piece in BREAKS_BEHIND.split(word):
        if _length(made[-1] + piece) > width and made[-1]:
            made.append("")
        while _length(piece) > width:
            made[-1], piece = piece[:width], piece[width:]
            made.append("")
        made[-1] += piece
    return made


def _print_table(
    names: Sequence[str] | None, rows: Sequence[Sequence[str]], widths: Sequence[int], right: Sequence[bool]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(text: str, width: int) -> Text:
        return Text("\n".join(lines_of(text, width)))

    table = Table(show_header=names is not None)
    for name, width, number in zip(names or [""] * len(widths), widths, right, strict=True):
        table.add_column(cell(name, width), justify="right" if number else "left", no_wrap=True, width=width)
    for row in rows:
        table.add_row(*(cell(text, width) for text, width in zip(row, widths, strict=True)))
    Console(width=max(_width(), sum(widths) + 3 * len(widths) + 1)).print(table)


def _show_lists(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    names = max(map(_length, columns))
    for number, row in enumerate(rows):
        if number:
            typer.echo()
        for name, text in zip(columns, row, strict=True):
            first, *others = lines_of(text, max(SHORTEST, _width() - names - APART))
            typer.echo(f"{name:<{names + APART}}{first}".rstrip())
            for line in others:
                typer.echo(" " * (names + APART) + line)
