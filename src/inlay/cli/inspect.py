"""`inlay inspect`: what is in an adapter, and which base it belongs to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli.output import show_table, write_json


def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an adapter.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Show what is in an adapter. Reads the file's header only, and no base."""
    facts = describe(adapter)
    if as_json:
        write_json(facts)
        return
    unsaid = {"where": "the method's own places", "layers": "all"}
    shown = {key: unsaid.get(key) if value is None else value for key, value in facts.items()}
    rows = [(key.replace("_", " "), _plain(value)) for key, value in shown.items() if key != "tensors"]
    show_table(f"Adapter {facts['name']}", ("", ""), rows)
    if tensors:
        listed = [(n, t["dtype"], " × ".join(map(str, t["shape"]))) for n, t in facts["tensors"].items()]
        show_table("Tensors", ("name", "type", "shape"), listed)


def describe(folder: Path) -> dict[str, Any]:
    """The facts of a stored adapter as plain data.

    Keys: ``name, method, hyper_parameters, where, layers, modules_to_save, parameters, bytes, types, base,
    base_name, digest, inlay, path`` and ``tensors`` (name → type and shape).

    Raises:
        AdapterFileError: there is no adapter, or its header is not whole.
    """
    from inlay.formats.native import read_header

    header = read_header(folder)
    method = dict(header["method"])
    tensors: dict[str, Any] = header["tensors"]
    return {
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
        "tensors": tensors,
    }


def _plain(value: Any) -> str:
    match value:
        case None:
            return "–"
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case dict():
            return "\n".join(f"{key}: {item}" for key, item in value.items()) or "–"
        case list():
            return ", ".join(map(str, value)) or "–"
    return str(value)
