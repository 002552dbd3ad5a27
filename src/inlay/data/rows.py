"""Checking the values of rows: text, labels, chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.data.findings import Findings
from inlay.data.jsonrows import kind_of
from inlay.data.parsed import ORIGIN

_TEXT = 'Write every value of this column as text (numbers in quotes: "3"), or remove the row.'
_FILLED = "Fill in the text, or remove the row."
_CHAT = 'Each chat is a list such as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].'


@dataclass
class Rows:
    """A batch of rows being processed: columns, the rows' places, and the problems found so far.

    A row with a problem is reported, once for each problem, and then left out.
    """

    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str]
    found: Findings

    def __len__(self) -> int:
        return len(self.places)

    @staticmethod
    def of(batch: Mapping[str, Sequence[Any]], first: int, found: Findings) -> Rows:
        """The rows of a batch; without the column `ORIGIN` they are named by number, counted from `first`."""
        size = len(next(iter(batch.values())))
        places = batch.get(ORIGIN) or [f"row {row}" for row in range(first + 1, first + size + 1)]
        return Rows(batch, list(places), found)

    def text(self, row: int, column: str, *, may_be_empty: bool = False) -> str | None:
        """The text in a cell; `None` if it is not text, which is reported."""
        value = self.columns[column][row]
        if isinstance(value, str) and (may_be_empty or value.strip()):
            return value
        what = "only white space" if isinstance(value, str) and value else kind_of(value)
        remedy = _FILLED if isinstance(value, str) or value is None else _TEXT
        self.found.add(f"{self.places[row]}: {column!r} is {what}, expected text", remedy)
        return None

    def chat(self, row: int, column: str) -> list[dict[str, Any]] | None:
        """The messages in a cell; `None` if something is wrong with them, which is reported."""
        value = self.columns[column][row]
        wrong = _chat_fault(value)
        if wrong is None:
            return [{key: part for key, part in message.items() if part is not None} for message in value]
        self.found.add(f"{self.places[row]}: {column!r} {wrong}", _CHAT)
        return None


def _chat_fault(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"is {kind_of(value)}, expected a list of messages"
    if not value:
        return "has no messages"
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            return f"has {kind_of(message)} as message {number}, expected an object"
        if "from" in message and "value" in message:
            return "is in ShareGPT form (from/value), expected role/content"
        if not isinstance(message.get("role"), str):
            return f"has a message {number} whose role is {kind_of(message.get('role'))}, expected text"
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            return f"has a message {number} whose content is {kind_of(content)}, expected text"
    if not any(message["role"] == "assistant" for message in value):
        return "has no assistant message, so nothing can be learnt from it"
    return None
