"""`inlay methods`: every method, what it costs on a model, and what it supports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inlay.cli import flags
from inlay.cli.output import write_json
from inlay.cli.tables import show_facts, show_table, show_text

if TYPE_CHECKING:
    from inlay.core.contracts.method import Method

COUNTED = Path(__file__).with_name("methods.json")


def methods(
    base: Annotated[
        str | None,
        typer.Option(help="Transformers folder or hub name to count parameters on. Default: the embedded base."),
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """List every method: family, hyper-parameters, trained parameters, what it supports."""
    rows = None if base else counted_before()
    if rows is None:
        from inlay.train import load_base

        rows = describe(load_base(base, precision="stored").model)
    if as_json:
        rows = [row | {"quantised_bases": _on_quantised(row["method"])} for row in rows]
        write_json({"base": base or "embedded", "methods": rows})
        return
    show_table(
        f"Methods, counted on {base or 'the embedded base'} at their defaults",
        ("method", "family", "trained", "share", "merges", "mixed"),
        [_cells(row) for row in rows],
        numbers=("trained", "share"),
        whole=("method", "family", "merges", "mixed"),
        lesser=("share", "mixed", "merges"),
    )
    show_text("merges: into the base's weights. mixed: beside other adapters in one batch.")
    for row in rows:
        if "unsupported" in row:
            show_text(f"{row['method']} cannot be put on this base: {row['unsupported']}")
    settings = {row["method"]: _settings(row["hyper_parameters"]) for row in rows}
    show_facts("Hyper-parameters (--set NAME=VALUE) and their defaults", settings)


def counted_before() -> list[dict[str, Any]] | None:
    """The rows of `describe` on the embedded base as `make docs` wrote them, which takes no torch.

    None where other packages add methods, or the files of the methods have changed since.
    """
    from importlib.metadata import entry_points

    from inlay.methods import GROUP
    from inlay.methods._row import declared

    kept = json.loads(COUNTED.read_text(encoding="utf-8"))
    if kept["declared"] != declared() or entry_points(group=GROUP):
        return None
    return [{key: _frozen(value) for key, value in row.items()} for row in kept["rows"]]


def _frozen(value: Any) -> Any:
    """Lists, as JSON has them, as the tuples that methods have."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def describe(model: Any) -> list[dict[str, Any]]:
    """A row a method, found out by building it for `model`, which is left as it is.

    Keys: ``method, family, paper, hyper_parameters, where, recipe``; ``trained`` and ``share`` (of the base's
    parameters), ``merges`` (into the base's weights), ``mixed_batches`` (rows of one batch with different
    adapters). A method that this model cannot carry has ``unsupported`` with the reason instead.
    """
    from inlay.methods import registry

    total = sum(parameter.numel() for parameter in model.parameters())
    return [_describe_one(model, total, cls) for cls in registry().values()] + _baselines()


def _on_quantised(name: str) -> dict[str, Any]:
    """Quantisation → whether the method works on such a base: true, or why not; nothing for a baseline."""
    from inlay.bases.loading import LIBRARIES
    from inlay.bases.trial import refusal
    from inlay.methods import registry

    cls = registry().get(name)
    return {} if cls is None else {base: refusal(cls.examples()[0], base) or True for base in LIBRARIES}


def _baselines() -> list[dict[str, Any]]:
    """The same rows for what trains nothing of the base."""
    from inlay.baselines import baselines

    return [
        {
            "method": cls.name,
            "family": cls.family,
            "paper": cls.paper,
            "hyper_parameters": {k: v for k, v in cls().to_dict().items() if k != "method"},
            "where": None,
            "recipe": None,
            "trained": 0,
            "share": 0.0,
            "merges": False,
            "mixed_batches": False,
        }
        for cls in baselines().values()
    ]


def _describe_one(model: Any, total: int, cls: type[Method]) -> dict[str, Any]:
    import dataclasses

    import inlay.bases  # registers the layer types that can be read  # noqa: F401
    from inlay.core.build import build
    from inlay.core.contracts.pieces import DeltaPiece, PromptPiece, SubsetPiece
    from inlay.core.errors import SelectionError, UnsupportedError
    from inlay.core.model.select import Places

    method = cls()
    facts: dict[str, Any] = {
        "method": cls.name,
        "family": cls.family,
        "paper": cls.paper,
        "hyper_parameters": {k: v for k, v in method.to_dict().items() if k != "method"},
        "where": cls.default_where,
        "recipe": dataclasses.asdict(cls.recipe),
    }
    try:
        adapter = build(model, method, name="described", places=Places.of(None, None))
    except (SelectionError, UnsupportedError) as error:
        return facts | {"unsupported": str(error)}
    pieces = adapter.pieces
    return facts | {
        "trained": adapter.count,
        "share": adapter.count / total,
        "merges": all(
            not isinstance(p, PromptPiece) and (not isinstance(p, DeltaPiece) or p.delta.merges) for p in pieces
        ),
        "mixed_batches": not any(isinstance(p, SubsetPiece) for p in pieces),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    names = [row["method"], row["family"]]
    if "unsupported" in row:
        return [*names, "–", "–", "–", "–"]
    supports = ["yes" if row[key] else "no" for key in ("merges", "mixed_batches")]
    return [*names, f"{row['trained']:,}", f"{row['share']:.2%}", *supports]


def _settings(values: dict[str, Any]) -> str:
    """Hyper-parameters as ``--set`` reads them: numbers without separators, lists with commas."""
    return ", ".join(f"{key}={_word(value)}" for key, value in values.items()) or "none"


def _word(value: Any) -> str:
    match value:
        case None | "" | () | []:
            return "none"
        case bool():
            return str(value).lower()
        case list() | tuple() if not any(isinstance(item, dict) for item in value):
            return ",".join(map(_word, value))
        case list() | tuple() | dict():
            return json.dumps(value)
    return str(value).replace("\n", "\\n")
