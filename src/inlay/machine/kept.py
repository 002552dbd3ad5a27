"""What was measured on this machine, kept in the user's cache folder, so that it is measured once and not each time."""

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
    """Of inlay, where the system keeps what programs can make again; it need not exist."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "inlay" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "inlay"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlay"


class Kept(NamedTuple):
    """What was measured, and how many seconds ago."""

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
    """What `measure` gives, or gave under the same circumstances before; measured anew where nothing can be kept.

    Args:
        name: of the file, letters and dashes.
        circumstances: all that the result depends on, as JSON: processor, versions, restrictions.
        usable: whether a file's value is one that `measure` can have given; others are measured anew.
        lasts: seconds after which it is measured anew.
    """
    said = json.dumps(circumstances, sort_keys=True, default=str)
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError, RecursionError):
        path = _path(name, said)
        found = json.loads(path.read_text(encoding="utf-8"))
        value, age = found["result"], max(0.0, time.time() - path.stat().st_mtime)
        if age <= lasts and usable(value):
            return Kept(value, age)
    value = measure()
    with suppress(OSError, RuntimeError):  # no home, or a folder that cannot be written to: no reason not to go on
        path = _path(name, said)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"result": value, "circumstances": said}), encoding="utf-8")
        os.replace(part, path)
    return Kept(value, 0.0)


def _path(name: str, said: str) -> Path:
    return cache_folder() / f"{name}-{sha256(said.encode()).hexdigest()[:16]}.json"
