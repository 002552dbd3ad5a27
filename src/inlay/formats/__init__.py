"""Saving and loading adapters: inlay's own format, and those of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from inlay.core.errors import AdapterFileError, ConfigError, OutputError, UnsupportedError
from inlay.formats import configuration, header

if TYPE_CHECKING:  # `inlay inspect` tells formats apart without torch
    from torch import nn

    from inlay.core.contracts.adapter import Adapter

FORMATS = ("native", "peft")


def save(model: nn.Module, name: str, folder: str | Path, *, format: str = "native") -> Path:
    """Write adapter `name` to `folder`; other files in the folder are left alone.

    Args:
        format: ``native``, or ``peft`` for Hugging Face PEFT's files.

    Raises:
        AdapterNameError: there is no such adapter.
        UnsupportedError: the adapter cannot be expressed in the format; the message says what has no counterpart.
        OutputError: the folder cannot be written, or has another adapter that would be read in this one's place.
            What was there before is still there.
    """
    from inlay.core.forward.active_adapters import roster_of
    from inlay.formats import native, peft

    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    roster = roster_of(model)
    if roster.merged is not None:
        raise UnsupportedError(
            f"adapter {roster.merged.name!r} is merged into the base; call unmerge() before saving adapters"
        )
    adapter = roster.require(name)
    if format == "native":
        return native.write(model, adapter, Path(folder))
    if header.recognises(Path(folder)) and not native.holds(Path(folder), adapter):
        raise OutputError(
            f"{folder} has an adapter in inlay's own format with other values, which would be loaded instead of it; "
            "choose another folder, or remove it"
        )
    return peft.write(model, adapter, Path(folder))


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    trainable: bool = False,
    allow_pickle: bool = False,
    alpha: float | None = None,
    task: int | None = None,
) -> Adapter:
    """Attach the adapter stored in `folder`. It becomes the active one, and is frozen unless `trainable`.

    The format is recognised by the files: inlay's own, Hugging Face PEFT's, AdapterHub's; a single file
    (``.safetensors``, ``.pt``, ``.bin``) is loralib's or t-few's.

    Args:
        name: the name to attach it under; None means the name it was saved under, or ``default`` if it has none.
        allow_pickle: also read tensors from another library's pickle (with `weights_only`, so that none of its code
            runs).
        alpha: alpha of a LoRA in a single file, which does not contain it.
        task: number of a multitask prompt in one of PEFT's files that has several.

    Raises:
        AdapterFileError: the file is missing, truncated or changed, or its tensors do not fit this model.
        BaseMismatchError: it was trained on another base. Whatever is raised, the model is unchanged.
    """
    from inlay.formats import adapterhub, loralib, native, peft

    path = Path(folder)
    kind = format_of(path)
    if alpha is not None and kind != "tensors":
        raise ConfigError(
            "alpha is only for single files, which do not contain it; leave it out, this adapter has its own"
        )
    if task is not None and kind != "peft":
        raise ConfigError("task is only for PEFT's multitask prompts; this file has one adapter, so leave it out")
    match kind:
        case "tensors":
            return loralib.read(model, path, name=name, trainable=trainable, allow_pickle=allow_pickle, alpha=alpha)
        case "peft":
            return peft.read(model, path, name=name, trainable=trainable, allow_pickle=allow_pickle, task=task)
        case "adapterhub":
            return adapterhub.read(model, path, name=name, trainable=trainable, allow_pickle=allow_pickle)
    return native.read(model, path, name=name, trainable=trainable)


def format_of(path: Path) -> str:
    """How an adapter is stored: ``native``, ``peft``, ``adapterhub``, or ``tensors`` for a single foreign file.

    Raises:
        AdapterFileError: nothing is there, or a configuration that cannot be read.
    """
    if not path.exists():
        raise AdapterFileError(f"{path}: no such file or folder; expected an adapter")
    if path.is_file() and path.name != header.FILE:
        return "tensors"
    if header.recognises(path):
        return "native"
    if configuration.is_pefts(path):
        return "peft"
    if configuration.is_adapterhubs(path):
        return "adapterhub"
    below = sorted(p.parent.name for p in path.glob(f"*/{configuration.FILE}")) if path.is_dir() else []
    if below and not (path / header.FILE).exists():
        raise AdapterFileError(f"{path}: holds several adapters ({', '.join(below)}); give the folder of one of them")
    return "native"
