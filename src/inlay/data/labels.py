"""Labels: their vocabulary, their class numbers, and numbers to predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inlay.core.errors import DataError, nearest
from inlay.data.findings import Findings
from inlay.data.jsonrows import kind_of
from inlay.data.rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset

    from inlay.data.columns import Layout

_BATCH = 1000


def labels_of(dataset: Dataset, layout: Layout) -> list[str]:
    """The label vocabulary of training data: names whose index is the class.

    A `ClassLabel` column keeps its own order. Otherwise labels are in numerical order if all of them are whole numbers
    (or text that spells them), else in alphabetical order; the order of the rows does not matter. Labels are compared
    as text, so ``1`` in JSON is ``"1"`` in CSV.

    Raises:
        DataError: labels that are missing, of mixed or wrong type, equal except for spaces, or all the same.
    """
    column = layout.column("label")
    named = class_names(dataset, column)
    found = Findings(f"labels in column {column!r} cannot be used")
    seen: dict[str, str] = {}  # label → where it was seen first
    kinds: dict[str, str] = {}
    for start in range(0, len(dataset), _BATCH):
        rows = Rows.of(dataset[start : start + _BATCH], start, found)
        for row, name in enumerate(label_names(rows, column, named)):
            if name is not None:
                seen.setdefault(name, rows.places[row])
                kind = "text" if isinstance(rows.columns[column][row], str) else "number"
                kinds.setdefault(kind, rows.places[row])
    _check_spaces(seen, found)
    if len(kinds) > 1:
        found.add(
            f"labels are text in {kinds['text']} and numbers in {kinds['number']}",
            "Write all labels the same way.",
        )
    found.raise_if_any()
    if named is not None:
        return named
    if len(seen) == 1:
        only = next(iter(seen))
        raise DataError(f"all rows have the label {only!r}. A classifier needs at least two; check column {column!r}")
    if all(_is_whole(name) for name in seen):
        return sorted(seen, key=lambda name: (int(name), name))
    return sorted(seen)


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """The names of a `datasets.ClassLabel` column; `None` for other columns."""
    names = getattr(dataset.features[column], "names", None)
    return list(names) if names else None


def label_names(rows: Rows, column: str, named: Sequence[str] | None) -> list[str | None]:
    """Each row's label as text; `None` if something is wrong with it, which is reported."""
    return [_name(rows, row, column, named) for row in range(len(rows))]


def _name(rows: Rows, row: int, column: str, named: Sequence[str] | None) -> str | None:
    value: Any = rows.columns[column][row]
    if named is not None and isinstance(value, int):
        if 0 <= value < len(named):
            return named[value]
        rows.found.add(
            f"{rows.places[row]}: label {value} is not a class (there are {len(named)})",
            "Rows without a label (-1) cannot be used: remove them.",
        )
        return None
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case str() if value.strip():
            return value
        case float() if not math.isnan(value):
            remedy = "Use the task regression for numbers, or write classes as text or whole numbers."
        case _:
            remedy = "Give the row a label (text or a whole number), or remove it."
    rows.found.add(f"{rows.places[row]}: {column!r} is {kind_of(value)}, expected a label", remedy)
    return None


def label_ids(rows: Rows, column: str, named: Sequence[str] | None, known: Sequence[str]) -> list[int | None]:
    """Each row's class among the `known` labels; `None` if its label was never seen in training, which is reported."""
    index = {name: place for place, name in enumerate(known)}
    ids: list[int | None] = []
    for row, name in enumerate(label_names(rows, column, named)):
        ids.append(None if name is None else index.get(name))
        if name is not None and name not in index:
            shown = ", ".join(known[:24]) + (", …" if len(known) > 24 else "")
            hint = nearest(name, known) if "did you" in nearest(name, known) else ""
            rows.found.add(
                f"{rows.places[row]}: label {name!r} was never seen in training{hint}",
                f"Known labels: {shown}. Correct or remove the row, or train with data that has the label.",
            )
    return ids


def numbers(rows: Rows, column: str) -> list[float | None]:
    """Each row's number to predict; text that spells a number counts, because CSV only has text."""
    return [_number(rows, row, column) for row in range(len(rows))]


def _number(rows: Rows, row: int, column: str) -> float | None:
    value = rows.columns[column][row]
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number):
        return number
    what = repr(value) if isinstance(value, str) and value else kind_of(value)
    rows.found.add(
        f"{rows.places[row]}: {column!r} is {what}, expected a finite number",
        "Write numbers such as 3.5 (with a point), remove the row, or use the task classification for names.",
    )
    return None


def _check_spaces(seen: dict[str, str], found: Findings) -> None:
    stripped: dict[str, str] = {}
    for name, place in seen.items():
        other = stripped.setdefault(name.strip(), name)
        if other != name:
            found.add(
                f"{place}: label {name!r} differs from {other!r} only in white space",
                "Write the label the same way in all rows.",
            )


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isascii() and name.removeprefix("-").isdigit()
