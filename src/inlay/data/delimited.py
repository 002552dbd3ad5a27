"""From CSV and TSV text to rows. Cells stay text: `NA`, `null` and `007` are not converted."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from inlay.core.errors import DataError
from inlay.data.findings import Findings
from inlay.data.parsed import Parsed

Row = tuple[int, list[str]]  # first line, cells


def parse_delimited(text: str, name: str, *, delimiter: str, quoted: bool, header: tuple[str, ...] | None) -> Parsed:
    """Read the cells of a file; each row must have as many as the header.

    Args:
        text: the whole file.
        name: the file's name, for messages.
        delimiter: one character between cells.
        quoted: whether ``"`` quotes a cell (see `Reading`).
        header: the columns' names if the file has no header row.

    Raises:
        DataError: a duplicate or suspicious header, rows with another number of cells, a quote that is never closed.
    """
    found = Findings(f"{name} cannot be read")
    rows = _quoted_rows(text, delimiter, found) if quoted else _plain_rows(text, delimiter)
    names = list(header) if header else _header(rows, name, delimiter)
    _check_names(names, name, delimiter)
    lines: list[int | None] = []
    cells: list[list[str]] = []
    for line, row in rows:
        if len(row) == len(names):
            lines.append(line)
            cells.append(row)
        else:
            found.add(
                f"row {len(lines) + found.count + 1} (line {line}) has {_cells(len(row))}, the header has {len(names)}",
                _ragged_remedy(delimiter, quoted),
            )
    found.raise_if_any()
    columns = [list(column) for column in zip(*cells, strict=True)] if cells else [[] for _ in names]
    return Parsed(dict(zip(names, columns, strict=True)), lines)


def _header(rows: Iterator[Row], name: str, delimiter: str) -> list[str]:
    first = next(rows, None)
    if first is None:
        raise DataError(f"{name} is empty: no header row and no rows. Write the columns' names in line 1")
    return [cell.strip() for cell in first[1]]


def _check_names(names: list[str], name: str, delimiter: str) -> None:
    found = Findings(f"{name} cannot be read")
    for column in dict.fromkeys(names):
        at = [place for place, other in enumerate(names, start=1) if other == column]
        if not column:
            for place in at:
                names[place - 1] = f"column_{place}"  # pandas writes its index column without a name
        elif len(at) > 1:
            found.add(
                f"columns {', '.join(map(str, at))} of the header are all named {column!r}",
                "Give every column its own name.",
            )
    other = next((c for c in ";\t|," if c != delimiter and len(names) == 1 and c in names[0]), None)
    if other is not None:
        found.add(
            f"the header is one column, {names[0]!r}",
            f"Cells seem to be separated by {other!r}: read with delimiter={other!r}.",
        )
    found.raise_if_any()


def _plain_rows(text: str, delimiter: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line:
            yield number, line.split(delimiter)


def _quoted_rows(text: str, delimiter: str, found: Findings) -> Iterator[Row]:
    with _long_cells():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        first = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                found.add(
                    f"quotes do not fit from line {first} on ({error})",
                    'Double a quote inside a quoted cell (""), close every quote, or read with quoted=False '
                    "if quotes are ordinary characters.",
                )
                return
            if cells:
                yield first, cells
            first = reader.line_num + 1


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB per cell: documents are longer."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"


def _ragged_remedy(delimiter: str, quoted: bool) -> str:
    if quoted:
        return f"Put cells that contain {delimiter!r} or a line end in double quotes, or set delimiter."
    return (
        f"Quotes are ordinary characters here, so no cell may contain {delimiter!r} or a line end; "
        "if cells are quoted, read with quoted=True."
    )
