"""From JSON Lines and JSON text to rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from inlay.core.errors import DataError
from inlay.data.findings import Findings
from inlay.data.parsed import Parsed

_OBJECTS = 'Each row must be one object with named columns, such as {"prompt": "…", "completion": "…"}.'


def parse_jsonl(text: str, name: str) -> Parsed:
    """One object a line; empty lines are skipped.

    Raises:
        DataError: lines that are not JSON or not objects, each with its line number.
    """
    found = Findings(f"{name} cannot be read")
    rows: list[tuple[int | None, dict[str, Any]]] = []
    # Not str.splitlines: that also cuts at characters such as U+2028, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            found.add(f"line {number} is not valid JSON: {_why(error)}", _mend(line))
            continue
        if isinstance(value, dict):
            rows.append((number, value))
        else:
            found.add(f"line {number} is {kind_of(value)}, not an object", _OBJECTS)
    found.raise_if_any()
    return _columns(rows)


def parse_json(text: str, name: str) -> Parsed:
    """A list of objects; or JSON Lines in a ``.json`` file, as many tools write it.

    Raises:
        DataError: malformed JSON (with its line), something other than a list, or items that are not objects.
    """
    if text.lstrip().startswith("{") and _first_line_is_whole(text):
        return parse_jsonl(text, name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}. "
            "Write a list of objects, or one object a line in a .jsonl file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not readable JSON: {error}. Write a list of flat objects") from error
    if not isinstance(value, list):
        keys = f" with the keys {', '.join(map(repr, list(value)[:8]))}" if isinstance(value, dict) else ""
        raise DataError(
            f"{name} is {kind_of(value)}{keys}; expected a list of objects. "
            "Write only the list, or one object a line in a .jsonl file"
        )
    found = Findings(f"{name} cannot be read")
    for row, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            found.add(f"row {row} is {kind_of(item)}, not an object", _OBJECTS)
    found.raise_if_any()
    return _columns((None, item) for item in value)


def kind_of(value: Any) -> str:
    """A JSON value's kind in words, with the value if it is short."""
    match value:
        case None:
            return "null or missing"
        case bool():
            return f"{str(value).lower()}"
        case int() | float():
            return f"a number ({value})"
        case str():
            return "text" if value else "empty text"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"


def _first_line_is_whole(text: str) -> bool:
    try:
        json.loads(text.strip().split("\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return True


def _columns(rows: Iterable[tuple[int | None, dict[str, Any]]]) -> Parsed:
    rows = list(rows)
    names = dict.fromkeys(key for _, row in rows for key in row)
    return Parsed({key: [row.get(key) for _, row in rows] for key in names}, [line for line, _ in rows])


def _why(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _mend(line: str) -> str:
    if line.lstrip()[:1] in ("[", "]") or line.strip() in ("{", "}") or line.rstrip().endswith("},"):
        return "This looks like one JSON document: name the file .json, or read with format='json'."
    return "Write one complete object a line, with double quotes."
