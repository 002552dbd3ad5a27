"""Adapters in and out of files: inlay's own format here, the ecosystem's beside it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from inlay.core.contracts.adapter import Adapter
from inlay.core.errors import AdapterFileError, ConfigError, OutputError, UnsupportedError
from inlay.core.forward.roster import roster_of

FORMATS = ("native", "peft")


def save(model: nn.Module, name: str, folder: str | Path, *, format: str = "native") -> Path:
    """Write adapter `name` to `folder`; the folder may hold other files, which are left alone.

    Args:
        format: ``native``, or ``peft`` for Hugging Face PEFT's files.

    Raises:
        AdapterNameError: there is no such adapter.
        UnsupportedError: the adapter has no counterpart in the format; it says what has none.
        OutputError: the folder cannot be written, or would be read as another adapter that is there already; what
            was there before is still there.
    """
    from inlay.formats import native, peft

    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    roster = roster_of(model)
    if roster.merged is not None:
        raise UnsupportedError(
            f"adapter {roster.merged.name!r} is merged into the base; unmerge() before saving adapters"
        )
    adapter = roster.require(name)
    if format == "native":
        return native.write(model, adapter, Path(folder))
    if native.recognises(Path(folder)) and not native.holds(Path(folder), adapter):
        raise OutputError(
            f"{folder} holds an adapter of inlay's own with other values, which loading the folder would find first; "
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
    """Attach the adapter stored in `folder`; it is active, and frozen unless `trainable`.

    The format is recognised by the files: inlay's own, Hugging Face PEFT's, AdapterHub's; a single file
    (``.safetensors``, ``.pt``, ``.bin``) is loralib's or t-few's.

    Args:
        name: the name to attach it under; the one it was saved under where None (``default`` where it had none).
        allow_pickle: also read tensors from a foreign pickle (with `weights_only`, so that no code of it runs).
        alpha: of a LoRA in a single file, which does not say it.
        task: number of a multitask prompt in a file of PEFT's that holds several.

    Raises:
        AdapterFileError: the file is missing, cut short, changed, or holds tensors that do not fit.
        BaseMismatchError: it was trained on another base. In every case the model is as it was.
    """
    from inlay.formats import adapterhub, loralib, native, peft

    path = Path(folder)
    kind = format_of(path)
    if alpha is not None and kind != "tensors":
        raise ConfigError("alpha is only given for a single file that does not say it; this adapter says its own")
    if task is not None and kind != "peft":
        raise ConfigError("task is only given for PEFT's multitask prompts; this file holds one adapter")
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
        AdapterFileError: there is nothing, or a configuration that cannot be read.
    """
    from inlay.formats import adapterhub, native, peft

    if not path.exists():
        raise AdapterFileError(f"{path}: no such file or folder; expected an adapter")
    if path.is_file() and path.name != native.FILE:
        return "tensors"
    if native.recognises(path):
        return "native"
    if peft.recognises(path):
        return "peft"
    if adapterhub.recognises(path):
        return "adapterhub"
    below = sorted(p.parent.name for p in path.glob(f"*/{peft.FILE}")) if path.is_dir() else []
    if below and not (path / native.FILE).exists():
        raise AdapterFileError(f"{path}: holds several adapters ({', '.join(below)}); name the folder of one of them")
    return "native"
