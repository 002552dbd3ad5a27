"""`inlay combine`: the weighted sum of adapters as a new adapter, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inlay.cli import flags
from inlay.cli.output import write_json
from inlay.cli.tables import show_facts, show_table, told, told_number

if TYPE_CHECKING:
    from inlay.cli.models import Loaded

WORST = 8


def combine(
    adapter: Annotated[
        list[str],
        typer.Option(metavar="FOLDER[=WEIGHT]", help="Folder of an adapter and its weight, 1 if left out. Repeatable."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the combined adapter.")],
    base: flags.BaseOfAdapter = None,
    how: Annotated[
        str, typer.Option(help="concatenate (exact), svd, magnitude, dare, ties or dare-ties.")
    ] = "concatenate",
    rank: Annotated[
        int | None, typer.Option(help="Of the result at each site. Default: the largest of the adapters'.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the entries that the sparse ways keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of DARE's draw.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the new adapter.")] = "combined",
    as_json: flags.AsJson = False,
) -> None:
    """Sum adapters with weights (−1 negates), exactly or compressed, and say the error of each site."""
    import inlay
    from inlay.arithmetic import combine as combined
    from inlay.cli.merge import check_unused
    from inlay.cli.models import load_adapted
    from inlay.train.folder import write_beside

    weights = _weights(adapter)
    check_unused(out)
    loaded = load_adapted(base, list(weights), precision="stored")
    ways: Any = how
    named = {loaded.names[folder]: weight for folder, weight in weights.items()}
    report = combined(loaded.model, named, name=name, how=ways, rank=rank, density=density, seed=seed)

    def write(part: Path) -> None:
        inlay.save(loaded.model, name, part)
        _write_record(loaded, part)

    write_beside(out, write)
    facts = {"out": str(out), "adapters": weights, **report.to_dict()}
    if as_json:
        write_json(facts)
        return
    sites = sorted(report.sites.items(), key=lambda site: -site[1].frobenius)
    show_facts(
        f"Combined into {out}",
        {
            "method": f"{report.method} by {how}",
            "adapters": "\n".join(f"{told(weight)} × {folder}" for folder, weight in weights.items()),
            "worst relative error": f"{told_number(report.worst, 4)} of {len(sites):,} sites",
        },
    )
    show_table(
        "The sites with the largest errors",
        ("site", "rank", "error", "spectral"),
        [
            (
                key,
                error.rank or "–",
                *("–" if e is None else told_number(e, 4) for e in (error.frobenius, error.spectral)),
            )
            for key, error in sites[:WORST]
        ],
        numbers=("rank", "error", "spectral"),
    )


def _weights(words: list[str]) -> dict[str, float]:
    """Folder → weight. A folder whose own name ends like ``=2`` is one where it exists."""
    from inlay.core.errors import ConfigError, problems

    found: dict[str, float] = {}
    wrong = []
    for word in words:
        folder, equals, text = (word, "", "") if Path(word).is_dir() else word.rpartition("=")
        try:
            weight = float(text) if equals else 1.0
        except ValueError:
            wrong.append(f"{word!r}: {text!r} is not a number; write FOLDER=WEIGHT")
            continue
        folder = folder or word
        if folder in found:
            wrong.append(f"{folder} is given twice")
        found[folder] = weight
    if wrong:
        raise ConfigError(problems("--adapter", wrong))
    return found


def _write_record(loaded: Loaded, folder: Path) -> None:
    """What evaluating must know, where the adapters' trainings agree on it."""
    from dataclasses import replace

    records = [record for record in loaded.records.values() if record is not None]
    if len(records) < len(loaded.records):
        return
    asked = {(r.task, r.kind, r.prompt_template, r.separator, r.labels) for r in records}
    if len(asked) == 1:
        replace(records[0], data={}, max_length=min(r.max_length for r in records)).write(folder)
