"""How an adapter's files name the base and the data it comes from: nothing in them tells of the author's machine."""

from __future__ import annotations

from pathlib import Path

LOCAL = "./"  # in front of the name of a folder or file that lay somewhere on the author's machine


def shareable(source: str) -> str:
    """A source as it may be published: a hub id or relative path as it is, any other path as ``./llama``.

    The embedded base, which every machine has elsewhere, is the empty string.
    """
    from inlay.assets import base_path

    path = Path(source).expanduser()
    if not source or path.resolve() == base_path().resolve():
        return ""
    return f"{LOCAL}{path.name}" if path.is_absolute() else source


def shown(source: str) -> str:
    """The same for people to read: ``llama``."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source
