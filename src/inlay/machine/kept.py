"""What was measured on this machine, kept in the user's cache folder, so that it is measured once and not each time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Of inlay, where the system keeps what programs can make again; it need not exist."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "inlay" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "inlay"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlay"


def kept(name: str, circumstances: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """What `measure` gives, or gave under the same circumstances before; measured anew where nothing can be kept.

    Args:
        name: of the file, letters and dashes.
        circumstances: all that the result depends on, as JSON: processor, versions, restrictions.
    """
    said = json.dumps(circumstances, sort_keys=True, default=str)
    path = cache_folder() / f"{name}-{sha256(said.encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(path.read_text(encoding="utf-8"))["result"]
    result = measure()
    with suppress(OSError):  # a folder that cannot be written to is no reason not to go on
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"result": result, "circumstances": said}), encoding="utf-8")
        os.replace(part, path)
    return result
