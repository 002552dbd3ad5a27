"""`inlay evaluate`: scores of a base, with or without an adapter, on a data file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from inlay.cli import flags
from inlay.cli.importing import importing
from inlay.cli.output import stages, write_json
from inlay.cli.tables import show_table, show_text, told, told_number

if TYPE_CHECKING:
    from inlay.cli.models import Loaded
    from inlay.data import Layout, Task
    from inlay.evaluate.run import Evaluation
    from inlay.train import TrainingRecord


def evaluate(
    data: flags.Data,
    adapter: Annotated[
        str | None, typer.Option(help="Folder of an adapter or baseline. Default: the base itself.")
    ] = None,
    base: flags.BaseOfAdapter = None,
    split: flags.Split = None,
    columns: flags.Columns = None,
    task: flags.Task = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated. Texts: loss, perplexity, bits_per_byte, exact_match, bleu, rouge1, "
            "rouge2, rougeL, rougeLsum. Labels: accuracy, macro_f1, matthews. Numbers: pearson, spearman."
        ),
    ] = None,
    answers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Generate answers to so many prompts, evenly spread; 0 is none. Default: all for the metrics or "
            "predictions you name; else at most 64, fewer where answers are long.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a row may have. Default: as in training, else the context.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Of a generated text. Default: a little more than the longest reference."),
    ] = None,
    num_beams: Annotated[int, typer.Option(help="Beam search over so many; 1 is greedy.")] = 1,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Write predictions and references to this JSONL file; needs a metric of answers."),
    ] = None,
    on_long: Annotated[
        Literal["error", "truncate", "split"] | None,
        typer.Option(help="Longer rows: error, truncate or split. Default: split for plain text, else error."),
    ] = None,
    reading: flags.Reading = None,
    quantize: flags.QuantizeAsTrained = None,
    precision: flags.Precision = None,
    as_json: flags.AsJson = False,
) -> None:
    """Score a base, with or without an adapter, on a data file."""
    with importing():
        from inlay.baselines import is_fitted
        from inlay.baselines.scoring import evaluate_folder
        from inlay.cli.models import base_of, load_adapted, template_of
        from inlay.data import Reading, read_table
        from inlay.evaluate.run import Settings, check_metrics
        from inlay.evaluate.run import evaluate as score
        from inlay.train import read_record
        from inlay.train.hyper import parse_fields
        from inlay.train.rows import context_of

    names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    record = read_record(adapter) if adapter else None
    if base is None and record is None and adapter is not None and not is_fitted(adapter):
        base = base_of([adapter])
    how = Reading(**parse_fields(Reading, reading or [], heading="--reading", noun="option"))
    dataset = read_table(data, split=split, reading=how)
    layout, task = _purpose(dataset, columns, task, record, base)
    fitted = adapter is not None and is_fitted(adapter)
    few = names is None and answers is None and predictions is None
    names = names if names is not None else _usual(layout, 0 if fitted else answers)
    check_metrics(names, layout)
    _check_answers(answers, names, layout, fitted)
    if predictions is not None:
        _check_predicts(predictions, names)
    if adapter is not None and fitted:
        with stages(as_json) as report:
            began = time.monotonic()
            scored = evaluate_folder(
                adapter,
                dataset,
                layout,
                base=base,
                metrics=names,
                batch_size=batch_size,
                max_length=max_length,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                on_long=on_long,
                precision=precision,
                progress=report,
            )
        typer.echo(str(scored.precision), err=True)
        about = {"data": data, "base": scored.base, "adapter": adapter, "precision": scored.precision.precision}
        _report(scored.evaluation, about, time.monotonic() - began, predictions, more=scored.facts, as_json=as_json)
        return
    loaded = load_adapted(base, [adapter] if adapter else [], task=task, quantize=quantize, precision=precision)
    typer.echo(str(loaded.precision), err=True)
    _check_trained(loaded)
    settings = Settings(
        batch_size=batch_size,
        max_length=max_length
        or (record.max_length if record is not None else context_of(loaded.model, loaded.tokenizer)),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        label_names=_labels(loaded, record),
        template=template_of(record),
        on_long=on_long,
        sample="few" if few else answers,
    )
    began = time.monotonic()
    with stages(as_json) as report:
        found = score(
            loaded.model,
            loaded.tokenizer,
            dataset,
            layout,
            task,
            metrics=names,
            settings=settings,
            progress=report,
        )
    about = {"data": data, "base": loaded.base, "adapter": adapter, "precision": loaded.precision.precision}
    _report(found, about, time.monotonic() - began, predictions, more={}, as_json=as_json)


def _report(
    found: Evaluation,
    about: dict[str, Any],
    seconds: float,
    predictions: Path | None,
    *,
    more: dict[str, Any],
    as_json: bool,
) -> None:
    """Print the scores.

    Args:
        about: ``data, base, adapter, precision``.
        more: named groups of numbers about how the answers came about.
    """
    if predictions is not None:
        _write_predictions(predictions, found)
    if as_json:
        facts = {key: value for key, value in found.items() if key != "predictions"} | more
        write_json({**about, **facts, "seconds": round(seconds, 3)})
        return
    _show(found, about["adapter"], about["data"])
    for name, fact in more.items():
        typer.echo(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {told(value)}" for key, value in fact.items()))


def _purpose(
    dataset: Any, columns: str | None, task: str | None, record: TrainingRecord | None, base: str | None
) -> tuple[Layout, Task]:
    """How to read the rows, and the task: as told, else as in training, else what data and base suggest."""
    from inlay.data import parse_columns, resolve_columns

    given = parse_columns(columns) if columns else {}
    if not given and record is not None and set(record.columns.values()) <= set(dataset.column_names):
        given = record.columns
    wanted: Any = task or (record.task if record is not None else None)
    layout = resolve_columns(dataset, given, task=wanted)
    return layout, wanted or _guessed_task(layout, base)


def _guessed_task(layout: Layout, base: str | None) -> Task:
    """The first task for such data that the base was trained for, by the architecture it names."""
    from inlay.core.errors import ConfigError
    from inlay.data.columns import TASKS_OF
    from inlay.train.loading import base_source, read_config

    source = base_source(base)
    named = " ".join(read_config(source).architectures or [])
    words = {
        "causal": ("ForCausalLM", "LMHeadModel"),
        "seq2seq": ("ForConditionalGeneration", "ForSeq2SeqLM"),
        "classification": ("ForSequenceClassification",),
        "regression": ("ForSequenceClassification",),
    }
    for task in TASKS_OF[layout.kind]:
        if any(word in named for word in words[task]):
            return task
    raise ConfigError(
        f"base {source} ({named or 'no architecture named'}) was not trained for {layout.kind} data; say "
        f"with --task which of {', '.join(TASKS_OF[layout.kind])} it should do, or give an --adapter"
    )


def _check_trained(loaded: Loaded) -> None:
    from inlay.core.errors import ConfigError

    if loaded.fresh:
        raise ConfigError(
            f"the base {loaded.base or 'embedded in inlay'} has no trained {', '.join(loaded.fresh)} for the task "
            f"{loaded.task}, so its answers would be random; give an --adapter that was trained for it"
        )


def _labels(loaded: Loaded, record: TrainingRecord | None) -> list[str] | None:
    """The labels in the order of the head's outputs; a record's even where a language model answers."""
    if record is not None and record.labels is not None:
        return list(record.labels)
    if loaded.task != "classification":
        return None
    names = loaded.model.config.id2label
    return [str(names[place]) for place in sorted(names)]


def _usual(layout: Layout, answers: int | None) -> list[str]:
    """The metrics where none is named."""
    from inlay.evaluate.run import DEFAULTS

    compared = ["exact_match"] if layout.kind == "completion" and answers != 0 else []
    return [*DEFAULTS[layout.kind], *compared]


def _check_answers(answers: int | None, names: Sequence[str], layout: Layout, fitted: bool) -> None:
    from inlay.core.errors import ConfigError
    from inlay.evaluate.metrics import METRICS

    if answers is None:
        return
    compared = [name for name in names if name in METRICS]
    if fitted or layout.kind in ("classification", "regression"):
        what = "a baseline" if fitted else f"{layout.kind} data"
        raise ConfigError(
            f"--answers is for texts that a model generates, and {what} is scored on all rows; leave it out"
        )
    if answers == 0 and compared:
        raise ConfigError(f"--answers 0 leaves nothing to compare for {', '.join(compared)}; leave one of them out")


def _check_predicts(path: Path, names: Sequence[str]) -> None:
    from inlay.core.errors import ConfigError
    from inlay.evaluate.metrics import METRICS

    if not any(name in METRICS for name in names):
        raise ConfigError(
            f"there would be no predictions to write to {path}: {', '.join(names)} only score the given "
            "texts. Add a metric of answers, for example --metrics exact_match"
        )


def _write_predictions(path: Path, found: Evaluation) -> None:
    from inlay.train.folder import write_text

    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found["predictions"]))


def _show(found: Evaluation, adapter: str | None, data: str) -> None:
    from inlay.evaluate.metrics import METRICS

    scales = {name: metric.scale for name, metric in METRICS.items()}
    units = {"loss": "nats a token", "perplexity": "≥ 1", "bits_per_byte": "bits a byte", **scales}
    rows = [(name, units[name], told_number(value, 4)) for name, value in found["metrics"].items()]
    title = f"{adapter or 'base'} on {data} ({found['rows']:,} rows, {found['kind']})"
    show_table(title, ("metric", "scale", "score"), rows, numbers=("score",))
    compared = [name for name in found["metrics"] if name in METRICS]
    if found["answered"] is not None:
        told = f"{found['answered']['prompts']:,} of {found['answered']['of']:,} prompts"
        show_text(f"{', '.join(compared)}: of the answers to {told} (--answers says how many, 0 none).")
