"""Evaluating a fitted baseline on a data set, with the same metrics and record as an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from inlay.baselines import artefact
from inlay.baselines.baseline import Baseline, Fitted, Rows
from inlay.core.errors import AdapterFileError, ConfigError
from inlay.data import Layout, OnLong, Template
from inlay.evaluate.metrics import METRICS, score
from inlay.evaluate.progress import Progress
from inlay.evaluate.run import DEFAULTS, LIKELIHOOD, Evaluation, Prediction, check_metrics, sides

if TYPE_CHECKING:
    from datasets import Dataset

    from inlay.machine.precision import Choice


class Scored(NamedTuple):
    """An evaluation, its base and precision, and facts about how the answers were found."""

    evaluation: Evaluation
    base: str | None
    precision: Choice
    facts: dict[str, Any]


def evaluate(
    baseline: Baseline, fitted: Fitted, rows: Rows, metrics: Sequence[str] | None = None
) -> tuple[Evaluation, dict[str, Any]]:
    """Score a fitted baseline on every row.

    Raises:
        ConfigError: metrics that do not suit the data or the baseline.
    """
    names = tuple(metrics) if metrics is not None else DEFAULTS[rows.layout.kind]
    check_metrics(names, rows.layout)
    found: dict[str, float] = {}
    predictions: list[Prediction] = []
    facts: dict[str, Any] = {}
    if any(name in LIKELIHOOD for name in names):
        scored, facts = baseline.likelihood(fitted, rows)
        found |= {name: getattr(scored, name) for name in names if name in LIKELIHOOD}
    if compared := [name for name in names if name in METRICS]:
        predictions, facts = baseline.predict(fitted, rows)
        found |= score(compared, *sides(predictions, rows.layout))
    evaluation = Evaluation(
        kind=rows.layout.kind,
        task=rows.task,
        rows=len(rows.dataset),
        metrics={name: found[name] for name in names},
        predictions=predictions,
        answered=None,
    )
    return evaluation, facts


def evaluate_folder(
    folder: str | Path,
    dataset: Dataset,
    layout: Layout,
    *,
    base: str | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    on_long: OnLong | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Score a stored baseline on the base it belongs to.

    Args:
        precision: as in `inlay.train.load_base`; None is ``auto`` for the CPU, where the model stays.

    Raises:
        ConfigError: the baseline does not support this `on_long`.
        AdapterFileError: the folder is incomplete.
        BaseMismatchError: `base` is not the one it was fitted on.
    """
    from inlay.train import load_base, read_record
    from inlay.train.loading import precision_for

    stored, record = artefact.read(folder), read_record(folder)
    if record is None:
        raise AdapterFileError(f"{folder} has no training.json, which says how its rows were read; copy it again")
    if on_long not in (None, *stored.baseline.on_long):
        raise ConfigError(f"on_long is {on_long!r}, expected {' or '.join(stored.baseline.on_long)}")
    source = base or record.base
    task: Any = record.task
    chosen = precision_for(source, precision or "auto", device="cpu")
    names = _names(task, record.labels, source)
    loaded = load_base(source, task=load_task(task, source), label_names=names, precision=chosen.precision)
    stored.check(loaded.model)
    rows = Rows(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        dataset=dataset,
        layout=layout,
        task=task,
        labels=record.labels,
        template=Template(prompt=record.prompt_template, separator=record.separator),
        max_length=max_length or record.max_length,
        batch_size=batch_size,
        on_long=on_long or "error",
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        progress=progress,
    )
    evaluation, facts = evaluate(stored.baseline, stored.fitted, rows, metrics)
    return Scored(evaluation, source, chosen, facts)


def load_task(task: str, base: str | None) -> str:
    """The task for which to load a base: features need no head, so any task that the base has will do."""
    from inlay.train.loading import able_tasks, base_source, read_config

    if task != "classification":
        return task
    able = able_tasks(read_config(base_source(base)))
    return next((name for name in ("classification", "causal", "seq2seq") if name in able), task)


def _names(task: str, labels: Sequence[str] | None, base: str | None) -> Sequence[str] | None:
    return labels if load_task(task, base) == "classification" else None
