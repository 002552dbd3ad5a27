"""Adapters in and out of files: inlay's own format here, the ecosystem's beside it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from inlay.core.adapter import Adapter
from inlay.core.errors import ConfigError, UnsupportedError
from inlay.core.roster import roster_of
from inlay.formats import native


def save(model: nn.Module, name: str, folder: str | Path, *, format: str = "native") -> Path:
    """Write adapter `name` to `folder`; the folder may hold other files, which are left alone.

    Raises:
        AdapterNameError: there is no such adapter.
        OutputError: the folder cannot be written; what was there before is still there.
    """
    if format != "native":
        raise ConfigError(f"unknown format {format!r}; known: native")
    roster = roster_of(model)
    if roster.merged is not None:
        raise UnsupportedError(
            f"adapter {roster.merged.name!r} is merged into the base; unmerge() before saving adapters"
        )
    return native.write(model, roster.require(name), Path(folder))


def load(model: nn.Module, folder: str | Path, *, name: str | None = None, trainable: bool = False) -> Adapter:
    """Attach the adapter stored in `folder`; it is active, and frozen unless `trainable`.

    Args:
        name: the name to attach it under; the one it was saved under where None.

    Raises:
        AdapterFileError: the file is missing, cut short, changed, or holds tensors that do not fit.
        BaseMismatchError: it was trained on another base. In every case the model is as it was.
    """
    return native.read(model, Path(folder), name=name, trainable=trainable)
