"""What is known of the built-in methods before any of them is imported.

`make docs` writes `_table.py` from the methods' files and `make check` compares. Between an edit and `make docs` it is
behind them: whoever would refuse something by a row asks here, where nothing is known then.
"""

from __future__ import annotations

from inlay.methods._row import Row, declared
from inlay.methods._table import DECLARED, METHODS


def listed(key: str) -> Row | None:
    """The row of a built-in method; None where there is none, or the files have changed since rows were written."""
    row = METHODS.get(key)
    return row if row is not None and declared() == DECLARED else None
