"""`inlay demo`: the embedded base learns the embedded task, with an adapter and with full fine-tuning."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inlay.cli import flags
from inlay.cli.output import stages, write_json
from inlay.cli.tables import show_table, told_number

if TYPE_CHECKING:
    from inlay.evaluate.run import Prediction
    from inlay.train import RunConfig

METRICS = ("exact_match", "rougeL", "bleu", "loss")
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"settings": {"rank": 16, "alpha": 32.0}, "where": "all-linear", "learning_rate": 3e-3},
    "full": {"learning_rate": 1e-3},
}
BATCH_SIZE = 8
EVALUATION_BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result: a model and its scores on the test records."""

    model: str
    metrics: dict[str, float]
    trained: int
    seconds: float


def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and results.")] = Path("runs/demo"),
    base: Annotated[str | None, typer.Option(help="Default: the embedded base.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training records.")] = 3.0,
    rows: Annotated[int, typer.Option(min=10, help="Training records; a tenth as many are held out.")] = 2000,
    as_json: flags.AsJson = False,
) -> None:
    """Fine-tune the embedded base on made-up records; show before, after, and full fine-tuning."""
    from inlay.data.demo import records, write_records

    splits = records(rows, valid=max(5, rows // 20), test=max(10, rows // 10))
    files = write_records(out / "data", splits)
    say = _quiet if as_json else typer.echo
    say(f"{rows:,} records to learn from, {len(splits['test'])} held out, in {out / 'data'}\n")
    first, before = _scored(base, None, files["test"], model="base", quiet=as_json)
    found, answers = [first], [before]
    for method in RECIPES:
        say(f"training: {_command(method, files['train'], out, epochs)}")
        trained, after = _trained(method, base, files, out, epochs, quiet=as_json)
        found.append(trained)
        answers.append(after)
    facts = _facts(found, splits["train"], epochs)
    _write(out / "results.json", facts)
    if as_json:
        write_json(facts)
        return
    _show_samples(answers[0], answers[1])
    _show_scores(found, facts["share_of_the_way"])
    prompt = splits["test"][1]["prompt"]
    say(f"\nThe adapter is in {out / 'lora' / 'adapter'}. Try it:")
    say(f"  inlay generate --adapter {out / 'lora' / 'adapter'} {prompt!r}")
    say(f"  inlay inspect {out / 'lora' / 'adapter'}")


def config_of(method: str, base: str | None, files: dict[str, Path], folder: Path, epochs: float) -> RunConfig:
    """The run that trains one of `RECIPES`."""
    from inlay.train import RunConfig

    return RunConfig.of(
        {
            "data": str(files["train"]),
            "eval_data": str(files["valid"]),
            "out": str(folder),
            "base": base,
            "method": method,
            "epochs": epochs,
            "batch_size": BATCH_SIZE,
            **RECIPES[method],
        }
    )


def share_of_the_way(base: float, adapter: float, full: float) -> float | None:
    """How much of full fine-tuning's gain over the base the adapter has; None where there is no gain."""
    return None if full == base else (adapter - base) / (full - base)


def _trained(
    method: str, base: str | None, files: dict[str, Path], out: Path, epochs: float, *, quiet: bool
) -> tuple[Row, list[Prediction]]:
    from inlay.train import run

    config = config_of(method, base, files, out / method, epochs)
    again = (out / method / "run.yaml").is_file()
    result = run(config, overwrite=again, progress=not quiet)
    return _scored(
        base,
        str(result.adapter),
        files["test"],
        model=method,
        trained=result.trainable,
        seconds=result.seconds,
        quiet=quiet,
    )


def _scored(
    base: str | None,
    adapter: str | None,
    file: Path,
    *,
    model: str,
    trained: int = 0,
    seconds: float = 0.0,
    quiet: bool,
) -> tuple[Row, list[Prediction]]:
    """Scores of what was saved, loaded afresh, as `inlay evaluate` would."""
    from inlay.cli.models import load_adapted
    from inlay.data import read_table, resolve_columns
    from inlay.evaluate.run import Settings, evaluate

    loaded = load_adapted(base, [adapter] if adapter else [])
    dataset = read_table(file)
    with stages(quiet) as report:
        found = evaluate(
            loaded.model,
            loaded.tokenizer,
            dataset,
            resolve_columns(dataset),
            "causal",
            metrics=METRICS,
            settings=Settings(batch_size=EVALUATION_BATCH),
            progress=report,
        )
    return Row(model=model, metrics=found["metrics"], trained=trained, seconds=seconds), found["predictions"]


def _facts(found: Sequence[Row], train: Sequence[object], epochs: float) -> dict[str, Any]:
    import torch
    import transformers

    from inlay import __version__

    base, adapter, full = found
    return {
        "task": "records to sentences",
        "train_rows": len(train),
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "recipes": RECIPES,
        "models": [asdict(row) for row in found],
        "share_of_the_way": {
            name: share_of_the_way(base.metrics[name], adapter.metrics[name], full.metrics[name]) for name in METRICS
        },
        "versions": {
            "inlay": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
    }


def _write(path: Path, facts: dict[str, Any]) -> None:
    from inlay.train.folder import write_text

    write_text(path, json.dumps(facts, indent=1) + "\n")


def _command(method: str, data: Path, out: Path, epochs: float) -> str:
    """What the user would type for the same run."""
    recipe = RECIPES[method]
    words = [f"inlay train --data {data} --method {method}"]
    words += [f"--set {key}={value:g}" for key, value in recipe.get("settings", {}).items()]
    words += [f"--where {recipe['where']}"] if "where" in recipe else []
    words += [f"--learning-rate {recipe['learning_rate']:g} --batch-size {BATCH_SIZE} --epochs {epochs:g}"]
    return " ".join([*words, f"--out {out / method}"])


def _show_samples(before: Sequence[Prediction], after: Sequence[Prediction]) -> None:
    """One record of each kind, as the base and as the adapter tell it."""
    from inlay.data.demo import KINDS

    cells = []
    for old, new in list(zip(before, after, strict=True))[: len(KINDS)]:
        prompt, right = old["prompt"].strip(), str(new["references"][0])
        answer = str(new["prediction"]).strip()
        mark = "✓" if answer == right else f"✗ expected: {right}"
        cells.append((prompt, _short(str(old["prediction"])), f"{answer}\n{mark}"))
    typer.echo()
    show_table("Held-out records", ("record", "base", "with the adapter"), cells)


def _show_scores(found: Sequence[Row], share: dict[str, float | None]) -> None:
    cells = [
        [
            row.model,
            *(told_number(row.metrics[name], 3) for name in METRICS),
            f"{row.trained:,}",
            f"{row.seconds:,.0f}",
        ]
        for row in found
    ]
    parts = ["–" if (part := share[name]) is None else f"{part:.0%}" for name in METRICS]
    cells.append(["of the way", *parts, f"{found[1].trained / found[2].trained:.1%}", "–"])
    numbers = ("exact match", "ROUGE-L", "BLEU", "loss", "trained", "seconds")
    show_table("Scores on held-out records", ("model", *numbers), cells, numbers=numbers, whole=("model",))


def _short(text: str, limit: int = 90) -> str:
    words = " ".join(text.split())
    return words if len(words) <= limit else words[: limit - 1] + "…"


def _quiet(_text: str) -> None:
    """Says nothing, where standard output belongs to JSON."""
