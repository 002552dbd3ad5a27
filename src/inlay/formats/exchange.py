"""The common part of reading other libraries' formats: a method, its places, and which tensor becomes which.

A format describes these in a `Reading`. `restore` builds the adapter beside the model, compares it with every tensor of
the file, and installs it only if nothing is missing, left over or of another shape. Writing goes the other way: a
`Writing` holds the foreign configuration and tensors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inlay.core.build import build
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import Method
from inlay.core.errors import AdapterFileError, AdapterNameError, OutputError, UserError, problems
from inlay.core.install import install
from inlay.core.model.select import Places
from inlay.formats.archive import Archive

# The errors that a value of a wrong type or size in a foreign configuration may cause.
CRASHES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, re.error)


def unchanged(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, made from tensors of theirs.

    Attributes:
        ours: its name in `Adapter.tensors`.
        theirs: name → shape that it must have in the file.
        make: called with their tensors, in order; returns ours.
    """

    ours: str
    theirs: Mapping[str, tuple[int, ...]]
    make: Callable[..., Tensor] = unchanged


@dataclass(frozen=True)
class Reading:
    """A foreign adapter in our terms.

    Attributes:
        entries: given the adapter that the method builds, its tensors.
        checks: tensors that are only compared: name → function of all values that says what is wrong, or None.
    """

    method: Method
    places: Places
    entries: Callable[[Adapter], Iterable[Entry]]
    modules_to_save: Sequence[str] = ()
    checks: Mapping[str, Callable[[Mapping[str, Tensor]], str | None]] = field(default_factory=dict)


@dataclass
class Writing:
    """An adapter in a foreign format."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def restore(
    model: nn.Module, reading: Reading, archive: Archive, *, name: str, trainable: bool, wrong: Sequence[str] = ()
) -> Adapter:
    """Attach what was read, or raise one error with everything that is wrong and leave the model unchanged.

    Args:
        wrong: problems that are already known.
    """
    found = list(wrong)

    def built() -> Adapter:
        return build(model, reading.method, name=name, places=reading.places, modules_to_save=reading.modules_to_save)

    try:
        with Weightless():
            planned = built()
    except AdapterNameError:
        raise
    except (UserError, *CRASHES) as error:
        raise AdapterFileError(problems(f"{archive.path} does not fit this model", [*found, str(error)])) from error
    found += _differences(list(reading.entries(planned)), reading.checks, archive.shapes)
    if found:
        raise AdapterFileError(problems(f"{archive.path} does not fit this model", found))
    values = archive.tensors
    found = [said for n, check in reading.checks.items() if n in values and (said := check(values)) is not None]
    if found:
        raise AdapterFileError(problems(f"{archive.path} does not fit this model", found))
    adapter = built()
    entries = {entry.ours: entry for entry in reading.entries(adapter)}
    with torch.no_grad():
        for ours, target in adapter.tensors().items():
            target.copy_(entries[ours].make(*(values[n] for n in entries[ours].theirs)))
    install(model, adapter, trainable=trainable)
    return adapter


def _differences(
    entries: list[Entry], checks: Mapping[str, object], stored: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Every tensor that is missing, has another shape, or is left over."""
    shapes = {n: tuple(s) for entry in entries for n, s in entry.theirs.items()}
    found = [f"{n} is missing" for n in shapes if n not in stored]
    found += [f"{n} has shape {stored[n]}, expected {s}" for n, s in shapes.items() if stored.get(n, s) != s]
    found += [f"{n} is stored, but nothing here takes it" for n in stored if n not in shapes and n not in checks]
    return found


class Weightless(TorchFunctionMode):
    """Tensors made here have a shape but take no memory, because a file may claim any rank."""

    MAKERS = (torch.empty,)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in self.MAKERS:
            given["device"] = "meta"
        return func(*args, **given)


def store(folder: Path, writing: Writing, weights: str, config: str) -> Path:
    """Write the tensors and then the configuration, each under another name first, then renamed.

    Raises:
        OutputError: the folder cannot be written.
    """
    parts = {name: folder / f".{name}.part" for name in (weights, config)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in writing.tensors.items()}
        save_file(tensors, parts[weights], metadata={"format": "pt"})
        parts[config].write_text(json.dumps(writing.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, part in parts.items():
            os.replace(part, folder / name)
    except (OSError, SafetensorError) as error:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise OutputError(
            f"{folder}: the adapter could not be written ({error}); free space or choose another folder"
        ) from error
    return folder / weights
