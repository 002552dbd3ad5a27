"""Parsing words of the command line, and text in YAML: lists, layers, places."""

from __future__ import annotations

import re
from typing import Any

MOST_LAYERS = 100_000  # in a range; more is a typing mistake


def listed(value: Any) -> Any:
    """Text such as ``a, b`` as a list; other values unchanged."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def layers(value: Any) -> Any:
    """``0-2,5`` as [0, 1, 2, 5], 3 as [3]; a list unchanged.

    Raises:
        ValueError: a part that is neither a number nor a range.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return value
    numbers: list[int] = []
    for part in listed(value):
        found = re.fullmatch(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < first + MOST_LAYERS:
            raise ValueError(f"layers {value!r}: {part!r} is not a number or a range such as 0-5")
        numbers += range(first, last + 1)
    return numbers


def places(value: Any) -> Any:
    """Parse `where` for `inlay.attach`: a keyword, role or name; several names (``a,b``); a pattern (``re:``).

    Raises:
        ValueError: the text after ``re:`` is not a regular expression.
    """
    if not isinstance(value, str):
        return value
    if value.startswith("re:"):
        try:
            return re.compile(value.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"where {value!r} is not a regular expression: {error}") from error
    return listed(value) if "," in value else value
