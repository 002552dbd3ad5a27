"""Measurements of this machine, kept in the user's cache folder so that they are made only once."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple


def cache_folder() -> Path:
    """inlay's cache folder, at the system's usual place; it need not exist."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "inlay" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "inlay"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlay"


class Kept(NamedTuple):
    """A measured value, and how many seconds ago it was measured."""

    value: Any
    age: float


def kept(
    name: str,
    circumstances: Mapping[str, Any],
    measure: Callable[[], Any],
    *,
    usable: Callable[[Any], bool] = lambda _value: True,
    lasts: float = math.inf,
) -> Kept:
    """The result of `measure`, or of an earlier one under the same circumstances; measured anew if nothing can be kept.

    Args:
        name: name of the file, letters and dashes.
        circumstances: everything on which the result depends, as JSON data: processor, versions, restrictions.
        usable: whether `measure` can have returned a stored value; other values are measured anew.
        lasts: seconds after which a value is measured anew.
    """
    said = json.dumps(circumstances, sort_keys=True, default=str)
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError, RecursionError):
        path = _path(name, said)
        found = json.loads(path.read_text(encoding="utf-8"))
        value, age = found["result"], max(0.0, time.time() - path.stat().st_mtime)
        if age <= lasts and usable(value):
            return Kept(value, age)
    value = measure()
    with suppress(OSError, RuntimeError):  # go on even without a home, or if the folder cannot be written to
        path = _path(name, said)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"result": value, "circumstances": said}), encoding="utf-8")
        os.replace(part, path)
    return Kept(value, 0.0)


def _path(name: str, said: str) -> Path:
    return cache_folder() / f"{name}-{sha256(said.encode()).hexdigest()[:16]}.json"
