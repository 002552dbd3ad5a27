"""What is known of the built-in methods before any of them is imported.

`_table.py` has a row a method. `make docs` writes it from the methods' files and `make check` compares; between an edit
and `make docs` it is behind them, and whoever would refuse something by it asks `listed`, which then knows nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A method in plain data.

    Attributes:
        cls: name of its class.
        family: as in the methods table.
        settings: hyper-parameter → its type, as written in Python, and its default, as written in YAML.
    """

    cls: str
    family: str
    settings: dict[str, tuple[str, Any]]


def listed(key: str) -> Row | None:
    """The row of a built-in method; None where there is none, or the files have changed since rows were written."""
    from inlay.methods._table import DECLARED, METHODS

    row = METHODS.get(key)
    return row if row is not None and declared() == DECLARED else None


def declared() -> str:
    """A digest of everything that this folder's classes declare: their names, bases and fields."""
    import re
    from hashlib import sha256
    from pathlib import Path

    declaration, found = re.compile(r"^(?:class \w.*|    \w+: .*)$", re.MULTILINE), sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update("\n".join([path.name, *declaration.findall(path.read_text("utf-8")), ""]).encode())
    return found.hexdigest()
