"""`src/inlay/methods/_table.py`: a row a built-in method, for what must be known before methods are imported."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

from inlay.core.contracts.method import Method
from inlay.methods import built_in, registry
from inlay.methods._row import Row, declared
from inlay.train.hyper import fields_of

HEAD = '''\
"""The built-in methods as plain data, in the order of the methods table, and their classes for type checkers.

Written by `make docs` from the files of this folder and compared by `make check`: edit those, not this.
After a merge that leaves conflicts here, take either side whole and run `make docs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.methods._row import Row

if TYPE_CHECKING:
'''


def listing() -> str:
    """The text of the file."""
    own = {key: cls for key, cls in registry().items() if key in built_in()}
    imports = sorted((key.replace("-", "_"), cls.__name__) for key, cls in own.items())
    rows = {key: row(cls) for key, cls in own.items()}
    return formatted(
        HEAD
        + "".join(f"    from inlay.methods.{module} import {name} as {name}\n" for module, name in imports)
        + f"\nDECLARED = {declared()!r}\nMETHODS: dict[str, Row] = {rows!r}\n"
    )


def row(cls: type[Method]) -> Row:
    """One method's."""
    return Row(cls.__name__, cls.family, settings(cls), accounts=cls.account is not Method.account)


def settings(cls: Any) -> dict[str, tuple[str, Any]]:
    """Hyper-parameter → (its type, its default)."""
    defaults = cls().to_dict()
    return {name: (written(hint), defaults[name]) for name, hint in fields_of(cls).items()}


def written(hint: Any) -> str:
    """A type as in the method's file, its names without their modules."""
    return re.sub(r"\b[a-z_]\w*\.(?=[\w.]*\w)", "", hint.__name__ if isinstance(hint, type) else str(hint))


def formatted(code: str) -> str:
    """The code as `ruff format` leaves it."""
    done = subprocess.run([sys.executable, "-m", "ruff", "format", "--stdin-filename", "_table.py", "-"], input=code,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout
