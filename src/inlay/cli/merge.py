"""`inlay merge`: an adapter folded into its base, as a plain transformers folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli.output import show_table, write_json


def merge(
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    base: Annotated[
        str | None,
        typer.Option(help="Transformers folder or hub name. Default: the embedded base."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Fold an adapter into its base and write model and tokenizer; inlay is not needed to use them."""
    check_unused(out)
    from inlay.cli.models import load_adapted

    import inlay

    model, tokenizer, names = load_adapted(base, [adapter])
    report = inlay.merge(model, names[0])
    write_merged(model, tokenizer, out)
    facts = {
        "out": str(out),
        "layers": len(report.layers),
        "largest_rounding_error": report.worst,
        "untied": report.untied,
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    }
    if as_json:
        write_json({**facts, "rounding_errors": report.layers})
    else:
        show_table(
            f"Merged {adapter}", ("", ""), [(key.replace("_", " "), value) for key, value in facts.items()]
        )


def check_unused(folder: Path) -> None:
    """Raise an `OutputError` where writing to `folder` would touch what is there."""
    from inlay.core.errors import OutputError

    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise OutputError(
            f"{folder} is already in use; nothing was written. Choose a new folder, or remove it"
        )


def write_merged(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a merged model and its tokenizer as a transformers folder, beside its place and then renamed.

    Raises:
        OutputError: the folder is in use or cannot be written; nothing of it is left then.
    """
    from safetensors import SafetensorError

    from inlay.core.errors import OutputError

    check_unused(folder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        beside.mkdir(parents=True)
        model.save_pretrained(beside, state_dict=base_tensors(model))
        tokenizer.save_pretrained(beside)
        os.replace(beside, folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder}: the merged model could not be written ({error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def base_tensors(model: Any) -> dict[str, Any]:
    """The state dict without what adapters put into the module tree."""
    from inlay.core.host import Storage

    stored = [f"{path}." for path, module in model.named_modules() if isinstance(module, Storage)]
    return {name: t for name, t in model.state_dict().items() if not name.startswith(tuple(stored))}
