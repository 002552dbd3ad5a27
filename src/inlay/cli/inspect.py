"""`inlay inspect`: what is in an adapter, and which base it belongs to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli import flags
from inlay.cli.output import write_json
from inlay.cli.tables import show_facts, show_table, told

SHOWN_DIGITS = 16  # of digests, in the table; --json has them whole


def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or a file of tensors.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    allow_pickle: flags.AllowPickle = False,
    as_json: flags.AsJson = False,
) -> None:
    """Show what is in an adapter: inlay's, PEFT's, AdapterHub's, loralib's. Reads the header only, and no base."""
    facts = describe(adapter, allow_pickle=allow_pickle)
    if as_json:
        write_json(facts)
        return
    native = facts["format"] == "native"
    unsaid = {"where": "the method's own places", "layers": "all"} if native else {}
    shown = {key: unsaid.get(key) if value is None else value for key, value in facts.items()}
    shown["tensors"] = f"{len(facts['tensors']):,} (--tensors lists them)"
    if native:
        shown["digest"] = facts["digest"][:SHOWN_DIGITS]
        shown["base"] = {part: (digest or "")[:SHOWN_DIGITS] for part, digest in facts["base"].items()}
    if facts["training"] is not None:
        shown["training"] = {key: v for key, v in facts["training"].items() if key != "data"}
    show_facts(f"Adapter {facts['name']}", {k: _lines(value) for k, value in shown.items() if value is not None})
    if tensors:
        listed = [(n, t["dtype"], " × ".join(map(told, t["shape"]))) for n, t in facts["tensors"].items()]
        show_table("Tensors", ("name", "type", "shape"), listed)


def describe(path: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """The facts of a stored adapter as plain data.

    Keys of inlay's own: ``format, name, method, hyper_parameters, where, layers, modules_to_save, parameters, bytes,
    types, base, base_name, digest, inlay, path, training`` (what its training left beside it, or None) and
    ``tensors`` (name → type and shape); and what the method has to tell (`Method.account`). Of another library's:
    those of `inlay.formats.describing.describe`, and ``training``.

    Raises:
        AdapterFileError: there is no adapter, or its header is not whole.
    """
    from inlay.formats import describing, format_of
    from inlay.train.record import read_record

    if format_of(path) == "native":
        return _native(path)
    facts = describing.describe(path, allow_pickle=allow_pickle)
    record = read_record(path) if path.is_dir() else None
    tensors = facts.pop("tensors")
    return {**facts, "training": None if record is None else dataclasses.asdict(record), "tensors": tensors}


def _native(folder: Path) -> dict[str, Any]:
    from inlay.formats.header import read_header
    from inlay.train.record import read_record

    header = read_header(folder)
    record = read_record(Path(header["path"]).parent)
    method = dict(header["method"])
    tensors: dict[str, Any] = header["tensors"]
    return {
        "format": "native",
        "name": header["name"],
        "method": method.pop("method"),
        "hyper_parameters": method,
        "where": header["places"].get("where"),
        "layers": header["places"].get("layers"),
        "modules_to_save": header["modules_to_save"],
        "parameters": sum(math.prod(t["shape"]) for t in tensors.values()),
        "bytes": Path(header["path"]).stat().st_size,
        "types": sorted({t["dtype"] for t in tensors.values()}),
        "base": header["base"],
        "base_name": header.get("base_name") or None,
        "digest": header["digest"],
        "inlay": header.get("inlay"),
        "path": header["path"],
        "training": None if record is None else dataclasses.asdict(record),
        **_account(header),
        "tensors": tensors,
    }


def _account(header: dict[str, Any]) -> dict[str, Any]:
    """What the method itself has to tell, from the few tensors that it looks at. Most have nothing: no torch then."""
    from inlay.methods._listed import listed

    row = listed(header["method"]["method"])
    if row is not None and not row.accounts and _usual(header["method"], row.settings):
        return {}
    from safetensors import SafetensorError, safe_open

    from inlay.core.errors import AdapterFileError, ConfigError
    from inlay.formats.exchange import CRASHES
    from inlay.methods import method_named

    try:
        method = method_named(header["method"]["method"]).from_dict(header["method"])
        with safe_open(header["path"], framework="pt") as file:
            return method.account(_Stored(file))
    except (ConfigError, SafetensorError, *CRASHES) as error:
        raise AdapterFileError(f"{header['path']}: its header cannot be used ({error})") from error


def _usual(values: dict[str, Any], settings: Mapping[str, tuple[str, Any]]) -> bool:
    """Whether hyper-parameters are beyond doubt without the method's own check: its defaults, or positive sizes."""
    given = {name: value for name, value in values.items() if name != "method"}
    return given.keys() <= settings.keys() and all(
        value == _listed(settings[name][1]) or _is_a_size(value, settings[name][0]) for name, value in given.items()
    )


def _is_a_size(value: Any, hint: str) -> bool:
    """Whether a value is of the type that the method's file says, and positive: a number, or a pattern of numbers."""
    if hint.startswith("Mapping[str, "):
        pairs = value if isinstance(value, list) else [None]
        number = hint.removeprefix("Mapping[str, ").partition("]")[0]
        return all(
            isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and _is_a_size(p[1], number) for p in pairs
        )
    if isinstance(value, bool):
        return hint == "bool"
    kind = hint.removesuffix(" | None")
    numeric = isinstance(value, int) or (kind == "float" and isinstance(value, float))
    return kind in ("int", "float") and numeric and bool(0 < value < math.inf)


def _listed(value: Any) -> Any:
    """A default as JSON has it."""
    return list(map(_listed, value)) if isinstance(value, tuple) else value


class _Stored(Mapping[str, Any]):
    """The tensors of an open file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getitem__(self, name: str) -> Any:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __len__(self) -> int:
        return len(self.file.keys())


def _lines(value: Any) -> Any:
    """Several facts under one name on a line each."""
    if isinstance(value, str):
        return value.replace("\n", "\\n")
    if not isinstance(value, dict) or not value:
        return value
    return "\n".join(f"{key}: {_lines(told(item))}" for key, item in value.items())
