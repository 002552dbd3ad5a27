"""What a safetensors file says before any tensor is read: names, types, shapes, and inlay's own facts of the adapter.

Nothing here needs torch, so `inlay inspect` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inlay.core.errors import AdapterFileError

HEADER_LIMIT = 64 * 2**20  # bytes; a real header has a few hundred for each tensor
FILE = "adapter.safetensors"
FORMAT = 1
KEYS = {"format", "name", "method", "places", "modules_to_save", "base", "base_name", "digest", "inlay"}


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's size.

    Raises:
        ValueError: they do not.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise ValueError(f"its header claims {length} bytes, but the file has {size}")
        try:
            raw = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("__metadata__", {}), dict):
        raise ValueError("its header is not a table of tensors")
    tensors = [t for n, t in raw.items() if n != "__metadata__"]
    if not all(map(_describes, tensors)):
        raise ValueError("its header lacks the type, shape or place of some tensor")
    end = max((t["data_offsets"][1] for t in tensors), default=0)
    if 8 + length + end != size:
        raise ValueError(f"its tensors end at byte {8 + length + end}, but the file has {size}")
    return raw


def _describes(entry: Any) -> bool:
    """Whether an entry of a header describes a tensor completely."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        return False
    return all(type(number) is int for number in [*shape, *place])


def recognises(folder: Path) -> bool:
    """Whether `folder` has an adapter in our format. (AdapterHub gives its file the same name.)"""
    path = folder / FILE if folder.is_dir() else folder
    try:
        return path.name == FILE and "inlay" in header_of(path).get("__metadata__", {})
    except (OSError, ValueError):
        return False


def read_header(folder: Path) -> dict[str, Any]:
    """The header of a stored adapter, with ``tensors``: name → {"dtype", "shape"}. No tensor is read.

    Raises:
        AdapterFileError: there is no adapter, or its header was not written by inlay.
    """
    path = folder / FILE if folder.is_dir() or not folder.suffix else folder
    try:
        raw = header_of(path)
        header = json.loads(raw.pop("__metadata__", {}).get("inlay", "null"))
    except FileNotFoundError as error:
        raise AdapterFileError(f"{folder}: no {FILE} there; expected a folder that inlay.save wrote") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
    if not _complete(header):
        raise AdapterFileError(f"{path}: not an adapter of inlay's format {FORMAT} (its header lacks or adds entries)")
    return {
        **header,
        "path": str(path),
        "tensors": {n: {"dtype": t["dtype"], "shape": t["shape"]} for n, t in raw.items()},
    }


def _complete(header: Any) -> bool:
    """Whether every entry is present and has its type. What the entries mean is only found out by loading."""
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        return False
    types = {"name": str, "method": dict, "places": dict, "modules_to_save": list, "base": dict, "digest": str}
    return (
        KEYS >= set(header) >= KEYS - {"base_name", "inlay"}
        and all(isinstance(header[key], kind) for key, kind in types.items())
        and isinstance(header["method"].get("method"), str)
        and all(value is None or isinstance(value, str) for value in header["base"].values())
    )
