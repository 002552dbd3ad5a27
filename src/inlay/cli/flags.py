"""Command-line options that several commands have, and those of `inlay train`, made from the options of a run.

What an option may be and does is said once, in `RunConfig`; only how it is spelt on a command line stands here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer

from inlay.train.options import Option, choices, options

Command = TypeVar("Command", bound=Callable[..., Any])

TYPES: dict[str, type] = {"boolean": bool, "integer": int, "number": float}
METAVARS = {
    "settings": "NAME=VALUE", "reading": "NAME=VALUE", "columns": "ROLE=NAME,…", "layers": "NUMBERS",
    "modules_to_save": "NAMES", "report_to": "NAMES", "early_stopping": "N", "trunk_cache": "auto|off|PATH",
    "trunk_cache_limit": "SIZE",
}  # fmt: skip
REPEATED = ("settings", "reading")
SPELT = {"settings": ("--set",), "gradient_checkpointing": ("--gradient-checkpointing", "--checkpointing")}

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Data = Annotated[str, typer.Option(help=options()["data"].told)]
BaseOfAdapter = Annotated[
    str | None,
    typer.Option(help="Transformers folder or hub id. Default: what the adapter belongs to, else the embedded base."),
]
Task = Annotated[str | None, typer.Option(help=f"One of {choices('task')}. Default: as in training.")]
Split = Annotated[str | None, typer.Option(help="Split of a datasets id.")]
Columns = Annotated[str | None, typer.Option(metavar=METAVARS["columns"], help=options()["columns"].told)]
Reading = Annotated[
    list[str] | None, typer.Option(metavar=METAVARS["reading"], help=f"{options()['reading'].told} Repeatable.")
]
QuantizeAsTrained = Annotated[
    str | None,
    typer.Option(help=f"Format of the base's weights: {choices('quantize')} or none. Default: as in training."),
]
Precision = Annotated[
    str | None,
    typer.Option(help=f"Precision to hold the base and compute in: {choices('precision')}. Default: auto."),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read tensors from a pickle (.bin, .pt) that you trust.")
]


def with_run_options(command: Command) -> Command:
    """A command of ``**given`` and options of its own that takes every option of a run; None is one not given."""
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    command.__signature__ = inspect.Signature([*map(_parameter, options().values()), *own])  # type: ignore[attr-defined]
    return command


def _parameter(option: Option) -> inspect.Parameter:
    known = [TYPES[kind] for kind in option.kinds if kind in TYPES]
    kind: Any = known[0] if len(option.kinds) == 1 and known else str
    if option.name in REPEATED:
        kind = list[str]
    flag = typer.Option(*_spelt(option), metavar=METAVARS.get(option.name), help=_help(option))
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag]
    )


def _spelt(option: Option) -> Sequence[str]:
    if option.name in SPELT:
        return SPELT[option.name]
    flag = f"--{option.name.replace('_', '-')}"
    # What is off by itself can only be switched on; what is found out can be decided both ways.
    return (f"{flag}/--no-{flag[2:]}",) if option.kinds == ("boolean",) and option.default is None else (flag,)


def _help(option: Option) -> str:
    return f"{option.help} Repeatable." if option.name in REPEATED else option.help
