"""`inlay merge`: an adapter folded into its base, as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli import flags
from inlay.cli.output import write_json
from inlay.cli.tables import show_facts


def merge(
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    base: flags.BaseOfAdapter = None,
    quantize: flags.QuantizeAsTrained = None,
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Leave a quantised base quantised; rounds the merged weights to its format."),
    ] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Fold an adapter into its base and write model and tokenizer; inlay is not needed to use them."""
    check_unused(out)
    import inlay
    from inlay.bases.loading import dequantise
    from inlay.cli.models import load_adapted

    loaded = load_adapted(base, [str(adapter)], quantize=quantize, precision="stored")
    check_requantize(loaded.model, requantize)
    report = inlay.merge(loaded.model, loaded.names[str(adapter)], requantize=requantize)
    if not requantize:
        dequantise(loaded.model)
    write_merged(loaded.model, loaded.tokenizer, out)
    facts = {
        "out": str(out),
        "layers": len(report.layers),
        "largest_rounding_error": report.worst,
        "largest_share_of_the_change_lost": max(report.lost.values(), default=0.0),
        "untied": report.untied,
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    }
    if as_json:
        write_json({**facts, "rounding_errors": report.layers, "shares_lost": report.lost})
    else:
        show_facts(f"Merged {adapter}", facts)


def check_requantize(model: Any, requantize: bool) -> None:
    """Raise a `ConfigError` where the merged base cannot be written in the format that it has."""
    from inlay.core.errors import ConfigError
    from inlay.core.model.layer import store_of

    formats = {store.name for module in model.modules() if (store := store_of(module)) is not None}
    if requantize and not formats:
        raise ConfigError("--requantize: the base is not quantised. Leave it out, or give --quantize nf4")
    if requantize and any(name.startswith("torchao") for name in formats):
        raise ConfigError(
            f"--requantize: {', '.join(sorted(formats))} has no file format that transformers reads back. Leave it "
            "out, and the merged weights are written dense; they can be quantised when they are loaded"
        )


def check_unused(folder: Path) -> None:
    """Raise an `OutputError` where writing to `folder` would touch what is there."""
    from inlay.core.errors import OutputError

    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} is already in use; nothing was written. Choose a new folder, or remove it")


def write_merged(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a merged model and its tokenizer as a transformers folder, beside its place and then renamed.

    Raises:
        OutputError: the folder is in use or cannot be written; nothing of it is left then.
    """
    from inlay.train.folder import write_beside
    from inlay.train.quiet import quiet_libraries

    def write(part: Path) -> None:
        with quiet_libraries():
            model.save_pretrained(part, state_dict=base_tensors(model))
            tokenizer.save_pretrained(part)

    check_unused(folder)
    write_beside(folder, write)


def base_tensors(model: Any) -> dict[str, Any]:
    """The state dict without what adapters put into the module tree."""
    from inlay.core.forward.host import Storage

    stored = [f"{path}." for path, module in model.named_modules() if isinstance(module, Storage)]
    return {name: t for name, t in model.state_dict().items() if not name.startswith(tuple(stored))}
