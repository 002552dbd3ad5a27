"""What `_table.py` is made of: a row a built-in method."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A method in plain data.

    Attributes:
        cls: name of its class.
        family: as in the methods table.
        settings: hyper-parameter → its type, as written in Python, and its default, as written in YAML.
        accounts: whether it has something to tell of a stored adapter (`Method.account`).
    """

    cls: str
    family: str
    settings: dict[str, tuple[str, Any]]
    accounts: bool = False


def declared() -> str:
    """A digest of everything that this folder's classes declare: their names, bases and fields."""
    import re
    from hashlib import sha256
    from pathlib import Path

    declaration, found = re.compile(r"^(?:class \w.*|    \w+: .*)$", re.MULTILINE), sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update("\n".join([path.name, *declaration.findall(path.read_text("utf-8")), ""]).encode())
    return found.hexdigest()
