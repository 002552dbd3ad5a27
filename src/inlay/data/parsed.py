"""Rows on their way from a file to a table, each with its place in the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset

from inlay.core.errors import DataError

ORIGIN = "__origin__"
"""Column with each row's place, such as ``tickets.csv, row 3 (line 4)``, kept through shuffles and splits."""


@dataclass(frozen=True)
class Parsed:
    """The columns of one file as plain values, and each row's first line (`None` if the format has no lines)."""

    columns: dict[str, list[Any]]
    lines: Sequence[int | None]

    def __len__(self) -> int:
        return len(self.lines)


def places(name: str, lines: Sequence[int | None]) -> list[str]:
    """Where each row is, in words; rows count from 1."""
    return [
        f"{name}, row {row}" + ("" if line is None else f" (line {line})") for row, line in enumerate(lines, start=1)
    ]


def origins(dataset: Dataset) -> list[str]:
    """The places of all rows; a data set that `read_table` did not make has row numbers only."""
    if ORIGIN in dataset.column_names:
        return list(dataset[ORIGIN])
    return [f"row {row}" for row in range(1, len(dataset) + 1)]


def to_dataset(parsed: Parsed, name: str) -> Dataset:
    """An in-memory data set with the columns of `parsed` and `ORIGIN`.

    Columns of one plain type keep it; nested and mixed ones become `datasets.Json`, which returns every value unchanged
    (Arrow would add missing keys to chat messages, and refuses mixed types).
    """
    arrays: dict[str, pa.Array] = {}
    for column, values in parsed.columns.items():
        try:
            arrays[column] = _array(values)
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name}: column {column!r} contains half a surrogate pair, which is not a character; "
                "look for a lone \\ud8xx escape and write the whole character"
            ) from error
    arrays[ORIGIN] = pa.array(places(name, parsed.lines), pa.string())
    return Dataset(pa.table(arrays))


def _array(values: list[Any]) -> pa.Array:
    nested = any(isinstance(value, dict) or _holds_nested(value) for value in values)
    if not nested:
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            pass
    stored = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(stored, pa.string()))


def _holds_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
