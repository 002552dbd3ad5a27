"""inlay's own format: one safetensors file whose header describes the adapter completely.

    <folder>/adapter.safetensors        tensors under the names of `Adapter.tensors()`
        metadata["inlay"]               JSON: format, method, places, modules_to_save, base fingerprint, digest

The file is read in three steps, each of which may refuse it before the next one takes memory: the header (checked
against the file's size), names and shapes (against what the method builds on this model), and the values (against the
digest). One error lists everything that is wrong; the model is only changed if nothing is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inlay import __version__
from inlay.core.build import build
from inlay.core.contracts.adapter import Adapter, digest_of
from inlay.core.contracts.method import Method
from inlay.core.errors import AdapterFileError, BaseMismatchError, ConfigError, OutputError, problems
from inlay.core.forward.active_adapters import held_by_others
from inlay.core.install import install
from inlay.core.model.fingerprint import Fingerprint, fingerprint
from inlay.core.model.select import Places
from inlay.formats.exchange import CRASHES, Weightless
from inlay.formats.header import FILE, FORMAT, read_header
from inlay.formats.provenance import shareable


def write(model: nn.Module, adapter: Adapter, folder: Path) -> Path:
    """Write the adapter under another name, then rename it, so that the folder never has half a file."""
    method, tensors = _stored(adapter)
    header = {
        "format": FORMAT,
        "name": adapter.name,
        "method": method.to_dict(),
        "places": adapter.places.to_dict(),
        "modules_to_save": list(adapter.modules_to_save),
        "base": fingerprint(model, without=adapter.copies).to_dict(),
        "base_name": shareable(str(getattr(getattr(model, "config", None), "name_or_path", "") or "")),
        "digest": digest_of(tensors),
        "inlay": __version__,
    }
    path = folder / FILE
    part = folder / f".{FILE}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"inlay": json.dumps(header)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            f"{folder}: the adapter could not be written ({error}); free space or choose another folder"
        ) from error
    return path


def holds(folder: Path, adapter: Adapter) -> bool:
    """Whether the adapter in `folder` has the same values as this one."""
    return bool(read_header(folder)["digest"] == digest_of(_stored(adapter)[1]))


def _stored(adapter: Adapter) -> tuple[Method, dict[str, Tensor]]:
    """What is written: the method as it is stored, and the tensors as they are in the file."""
    method, tensors = adapter.method.stored(adapter)
    return method, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read(model: nn.Module, folder: Path, *, name: str | None, trainable: bool, copies: bool = True) -> Adapter:
    """Attach a stored adapter, strictly.

    Args:
        copies: whether to read its `modules_to_save` too; without them the model may have another head.
    """
    header = read_header(folder)
    path = Path(header["path"])
    try:
        method = _method(header["method"])
        places = Places.from_dict(header["places"])
        stored_base = Fingerprint.from_dict(header["base"])
        saved = header["modules_to_save"] if copies else []
        kept: dict[str, Any] = {"name": name or header["name"], "places": places, "modules_to_save": saved}
        with Weightless():
            planned = build(model, method, **kept)
    except (ConfigError, *CRASHES) as error:
        raise AdapterFileError(f"{path}: its header cannot be used ({error})") from error
    whole = {n.removeprefix("copy/"): n for n in header["tensors"] if n.startswith("copy/")}
    left = () if copies else whole.values()
    _check_names(path, {n: t for n, t in header["tensors"].items() if n not in left}, planned.tensors())
    adapter = build(model, method, **kept)
    expected = adapter.tensors()
    differences = stored_base.differences(fingerprint(model, without=adapter.copies if copies else whole))
    if differences:
        trained_on = f" ({header['base_name']})" if header.get("base_name") else ""
        raise BaseMismatchError(
            problems(f"{path} was trained on another base{trained_on}; load the base it belongs to", differences)
        )
    tensors = _tensors(path)
    if digest_of(tensors) != header["digest"]:
        raise AdapterFileError(
            f"{path}: its values do not match its digest, so it was damaged or changed; copy it again"
        )
    _check_shared(path, model, adapter, tensors)
    with torch.no_grad():
        for key, target in expected.items():
            target.copy_(tensors[key])
    install(model, adapter, trainable=trainable)
    return adapter


def _method(values: Mapping[str, Any]) -> Method:
    from inlay.methods import method_named

    return method_named(str(values["method"])).from_dict(values)


def _check_shared(path: Path, model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """A file must not change values that attached adapters share with this one."""
    held = {p.data_ptr() for p in held_by_others(model, adapter)}
    wrong = [n for n, t in adapter.tensors().items() if t.data_ptr() in held and not torch.equal(t.cpu(), tensors[n])]
    if wrong:
        raise AdapterFileError(
            problems(
                f"{path} shares values with an adapter on this model whose values differ; load the files that were "
                "saved together, or detach that adapter first, so that this one gets a copy of its own",
                [f"{name} differs" for name in wrong],
            )
        )


def _check_names(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Raise one error with every difference between what is stored and what the method builds here."""
    wrong = [f"{n} is missing" for n in expected if n not in stored]
    wrong += [f"{n} is stored, but nothing here takes it" for n in stored if n not in expected]
    wrong += [
        f"{n} has shape {tuple(stored[n]['shape'])}, expected {tuple(t.shape)}"
        for n, t in expected.items()
        if n in stored and tuple(stored[n]["shape"]) != tuple(t.shape)
    ]
    if wrong:
        raise AdapterFileError(problems(f"{path} does not fit this model", wrong))


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
