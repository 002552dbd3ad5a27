"""The facts of a stored adapter in any format, read from its configuration and header, without a base.

Nothing in such a file is trusted: a header must agree with the file's size and with safetensors' rules, a configuration
is JSON of a modest size, a pickle is opened only on request and only for its tensors. What a configuration means for a
model is only found out by loading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from inlay.core.errors import AdapterFileError
from inlay.formats import format_of, single
from inlay.formats.archive import Archive, archive, open_archive
from inlay.formats.configuration import HUB_WEIGHTS, WEIGHTS, WITHOUT_EFFECT, read_config
from inlay.formats.header import read_header

# PEFT's word → our method, for every family that is read.
PEFT_METHODS = {
    "LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt-tuning", "PREFIX_TUNING": "prefix-tuning",
    "P_TUNING": "p-tuning", "MULTITASK_PROMPT_TUNING": "multitask-prompt", "ADAPTION_PROMPT": "llama-adapter",
    "TRAINABLE_TOKENS": "trainable-tokens", "VERA": "vera", "LOHA": "loha", "LOKR": "lokr", "ADALORA": "adalora",
    "OFT": "oft", "BOFT": "boft", "LN_TUNING": "norm-tuning",
}  # fmt: skip
HUB_METHODS = {"lora": "lora", "prefix_tuning": "prefix-tuning", "prompt_tuning": "prompt-tuning"}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
         "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


def describe(path: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """The facts of an adapter in another library's files.

    Keys: ``format, name, method`` (ours; None if unknown), ``kind`` (the format's own word),
    ``hyper_parameters`` (from its configuration), ``where, layers, modules_to_save, parameters, bytes, types,
    base_name, task, path`` and ``tensors`` (name → type and shape).

    Raises:
        AdapterFileError: there is no adapter, or it is incomplete, or it is a pickle, and pickles are not allowed.
    """
    kind = format_of(path)
    match kind:
        case "peft":
            file, said = open_archive(path, *WEIGHTS, allow_pickle=allow_pickle), _peft(read_config(path))
        case "adapterhub":
            file, said = open_archive(path, *HUB_WEIGHTS, allow_pickle=allow_pickle), _hub(read_config(path))
        case "tensors":
            file = archive(path, allow_pickle=allow_pickle)
            said = _single(file)
        case _:
            raise AdapterFileError(f"{path} is in inlay's own format; read its header instead")
    tensors = _tensors(file)
    return {
        "format": kind,
        **said,
        "parameters": sum(math.prod(t["shape"]) for t in tensors.values()),
        "bytes": file.path.stat().st_size,
        "types": sorted({t["dtype"] for t in tensors.values()}),
        "path": str(file.path),
        "tensors": tensors,
    }


def base_named(path: Path) -> str | None:
    """The base that an adapter's file names: a hub id, or a folder on some machine; None if it names none."""
    match format_of(path):
        case "native":
            named = read_header(path).get("base_name")
        case "tensors":
            return None
        case kind:
            named = read_config(path).get("base_model_name_or_path" if kind == "peft" else "model_name")
    return named if isinstance(named, str) and named else None


def _peft(values: Mapping[str, Any]) -> dict[str, Any]:
    kind = values.get("peft_type")
    ours = PEFT_METHODS.get(kind) if isinstance(kind, str) else None
    shown = ("target_modules", "layers_to_transform", "modules_to_save", *WITHOUT_EFFECT)
    return {
        "name": "default",
        "method": "dora" if ours == "lora" and values.get("use_dora") else ours,
        "kind": kind,
        "hyper_parameters": _said(values, shown),
        "where": values.get("target_modules"),
        "layers": values.get("layers_to_transform"),
        "modules_to_save": values.get("modules_to_save") or [],
        "base_name": values.get("base_model_name_or_path") or None,
        "task": values.get("task_type"),
    }


def _hub(values: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(values["config"])
    kind = config.get("architecture") or "bottleneck"
    ours = HUB_METHODS.get(kind) if isinstance(kind, str) else None
    if kind == "bottleneck":
        ours = "parallel" if config.get("is_parallel") else "houlsby" if config.get("mh_adapter") else "pfeiffer"
    if kind == "lora" and config.get("composition_mode") == "scale":
        ours = "ia3"
    return {
        "name": values.get("name") or "default",
        "method": ours,
        "kind": kind,
        "hyper_parameters": _said(config, ("architecture",)),
        "where": None,
        "layers": None,
        "modules_to_save": [],
        "base_name": values.get("model_name") or None,
        "task": None,
    }


def _single(file: Archive) -> dict[str, Any]:
    found = single.kind_of(file)
    ranks = sorted({shape[0] for name, shape in file.shapes.items() if name.endswith(single.LORA[0])})
    ends = (*single.LORA, single.SCALE)
    whole = sorted({n.rpartition(".")[0] for n in file.shapes if not n.endswith(ends)})
    return {
        "name": "default",
        "method": {"loralib": "lora", "t-few": "ia3"}[found],
        "kind": found,
        "hyper_parameters": {"rank": ranks, "alpha": "not in the file"} if found == "loralib" else {},
        "where": None,
        "layers": None,
        "modules_to_save": whole,
        "base_name": None,
        "task": None,
    }


def _said(values: Mapping[str, Any], shown: tuple[str, ...]) -> dict[str, Any]:
    """The entries of a configuration that are neither shown elsewhere nor empty."""
    return {key: value for key, value in values.items() if key not in shown and value not in (None, [], {})}


def _tensors(file: Archive) -> dict[str, dict[str, Any]]:
    """Name → type and shape; raises if the file is incomplete."""
    if file.pickled:
        types = {name: str(t.dtype).rpartition(".")[2] for name, t in file.tensors.items()}
        return {n: {"dtype": TYPES.get(types[n], types[n]), "shape": list(s)} for n, s in file.shapes.items()}
    try:
        _ = file.shapes  # the header is checked against the file's size before the file is opened
        with safe_open(file.path, framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return {name: {"dtype": part.get_dtype(), "shape": list(part.get_shape())} for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file.path}: not a whole safetensors file ({error}); copy it again") from error
