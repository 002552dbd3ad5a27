"""Tensors in a file: first names and shapes, checked against the file's size; the values later.

A safetensors file has all names and shapes in its header. A pickle is read with `weights_only=True`, only on request,
and only in PyTorch's zip form with uncompressed members, so that it cannot expand in memory.
"""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from inlay.core.errors import AdapterFileError
from inlay.formats.header import header_of

if TYPE_CHECKING:  # importing torch takes seconds, and shapes need none of it
    from torch import Tensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Archive:
    """A file of named tensors.

    Attributes:
        path: the file.
        pickled: whether it is a pickle.
    """

    path: Path
    pickled: bool

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, for every tensor."""
        if self.pickled:
            return {name: tuple(t.shape) for name, t in self.tensors.items()}
        try:
            raw = header_of(self.path)
            return {n: tuple(t["shape"]) for n, t in raw.items() if n != "__metadata__"}
        except (OSError, ValueError) as error:
            raise AdapterFileError(f"{self.path}: not a whole safetensors file ({error}); copy it again") from error

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Name → values."""
        if self.pickled:
            return _unpickled(self.path)
        try:
            with safe_open(self.path, framework="pt") as file:
                return {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{self.path}: not a whole safetensors file ({error}); copy it again") from error


def open_archive(folder: Path, *names: str, allow_pickle: bool) -> Archive:
    """The first of `names` that is in `folder`; safetensors before pickles.

    Raises:
        AdapterFileError: there is none, or only a pickle, and pickles are not allowed.
    """
    there = sorted((n for n in names if (folder / n).is_file()), key=lambda n: n.endswith(PICKLES))
    if not there:
        raise AdapterFileError(f"{folder}: none of {', '.join(names)} is there; copy the whole folder")
    return archive(folder / there[0], allow_pickle=allow_pickle)


def archive(path: Path, *, allow_pickle: bool) -> Archive:
    """One file as an archive, by its ending."""
    pickled = path.suffix in PICKLES
    if pickled and not allow_pickle:
        raise AdapterFileError(
            f"{path} is a pickle, which is read only on request: give allow_pickle=True (--allow-pickle) if you trust "
            "its source; only tensors are read from it"
        )
    return Archive(path, pickled)


def _unpickled(path: Path) -> dict[str, Tensor]:
    import torch
    from torch import Tensor

    try:
        with zipfile.ZipFile(path) as parts:
            unfolded = sum(part.file_size for part in parts.infolist())
        if unfolded > path.stat().st_size:
            raise ValueError(f"it expands to {unfolded} bytes from {path.stat().st_size}")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise AdapterFileError(f"{path}: not a whole PyTorch zip file of tensors ({error}); copy it again") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in found.items()):
        raise AdapterFileError(f"{path}: contains something other than named tensors")
    return {name: t.clone() for name, t in found.items()}
