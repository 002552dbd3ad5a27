"""Running a baseline: the same configuration, folder, record and card as training, without training."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from inlay.baselines import artefact
from inlay.baselines.baseline import Baseline, Fitted, Rows
from inlay.baselines.card import card
from inlay.baselines.scoring import evaluate, load_task
from inlay.core.errors import ConfigError, problems
from inlay.data import Template, labels_of
from inlay.data import fingerprint as rows_fingerprint
from inlay.train.config import RunConfig
from inlay.train.folder import RunFolder, write_beside, write_text
from inlay.train.loading import absolute, base_source, load_base, precision_for
from inlay.train.quiet import quiet_libraries
from inlay.train.record import TrainingRecord, versions
from inlay.train.rows import UNBOUNDED_CONTEXT, context_of, read_rows, roles_of, split_rows
from inlay.train.running import RunResult, peak_memory_bytes

# Options that a baseline would have to ignore.
_OF_TRAINING = (
    "where", "layers", "modules_to_save", "epochs", "steps", "accumulate", "learning_rate", "schedule", "warmup",
    "weight_decay", "max_grad_norm", "gradient_checkpointing", "eval_every", "save_every", "early_stopping",
    "report_to", "name",
)  # fmt: skip


def run(config: RunConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> RunResult:
    """Fit a baseline; the counterpart of `inlay.train.run`, with the same folder and result.

    Args:
        resume: return the result of a finished run; an unfinished one starts again, because it has no steps to keep.

    Raises:
        UserError: a mistake that the user can correct; the output folder is unchanged.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other: one goes on with a run, the other replaces it")
    baseline = artefact.build(config.method, config.settings)
    _check_options(config, baseline)
    folder = RunFolder(config.out)
    folder.check(resume=resume, overwrite=overwrite)
    if resume and folder.finished:
        return RunResult.read(folder.result)
    with folder.claimed(), quiet_libraries():
        return _fit(config, baseline, folder, progress=progress)


def _fit(config: RunConfig, baseline: Baseline, folder: RunFolder, *, progress: bool) -> RunResult:
    from transformers import set_seed

    source = absolute(base_source(config.base))
    data, held, layout = read_rows(config)
    task = baseline.task(layout, config.task, source)
    labels = tuple(labels_of(data, layout)) if layout.kind == "classification" else None
    data, held = split_rows(data, held, config)
    set_seed(config.seed)
    loading = load_task(task, config.base)
    chosen = precision_for(config.base, config.precision, device="cpu")  # where the model stays
    config = config.changed(precision=chosen.precision)
    if progress:
        sys.stderr.write(f"{chosen}\n")
    base = load_base(
        source if config.base else None,
        task=loading,
        label_names=labels if loading == "classification" else None,
        precision=chosen.precision,
    )
    rows = Rows(
        model=base.model,
        tokenizer=base.tokenizer,
        dataset=data,
        layout=layout,
        task=task,
        labels=labels,
        template=Template(prompt=config.prompt_template, separator=config.separator),
        max_length=config.max_length or context_of(base.model, base.tokenizer) or UNBOUNDED_CONTEXT,
        batch_size=config.batch_size,
        on_long=config.on_long or "error",
        seed=config.seed,
    )
    resolved = _resolved(config, baseline, rows)
    began = time.monotonic()
    fitted = baseline.fit(rows)
    seconds = round(time.monotonic() - began, 3)
    scores: dict[str, float] = {}
    if held is not None:
        changed = {**vars(rows), "dataset": held}
        found, _ = evaluate(baseline, fitted, Rows(**changed))
        scores = {f"eval_{name}": value for name, value in found["metrics"].items()}
    result = RunResult(
        out=folder.root,
        adapter=folder.adapter,
        metrics=scores,
        steps=0,
        best_step=None,
        stopped_early=False,
        seconds=seconds,
        trainable=0,
        peak_memory_bytes=peak_memory_bytes(),
        tokens_per_second=0.0,
        precision=chosen.precision,
    )
    folder.make_room()
    write_text(folder.config, resolved.to_yaml())
    record = _record(resolved, rows, held)
    eval_rows = 0 if held is None else len(held)
    write_beside(folder.adapter, lambda part: _write(part, baseline, fitted, rows, record, resolved, result, eval_rows))
    folder.finish(result.stored())
    return result


def _write(
    part: Path,
    baseline: Baseline,
    fitted: Fitted,
    rows: Rows,
    record: TrainingRecord,
    config: RunConfig,
    result: RunResult,
    eval_rows: int,
) -> None:
    artefact.write(part, baseline, fitted, rows.model)
    record.write(part)
    facts = {
        "rows": len(rows.dataset),
        "eval_rows": eval_rows,
        "parameters": fitted.parameters,
        "seconds": result.seconds,
    }
    (part / "README.md").write_text(card(config, baseline, record, facts, result.metrics), encoding="utf-8")


def _check_options(config: RunConfig, baseline: Baseline) -> None:
    """Raise one error that lists all options of training that were given."""
    defaults = {name: field.get_default(call_default_factory=True) for name, field in RunConfig.model_fields.items()}
    wrong = [f"{n} is given, but nothing is trained" for n in _OF_TRAINING if getattr(config, n) != defaults[n]]
    if config.on_long not in (None, *baseline.on_long):
        wrong.append(f"on_long is {config.on_long!r}, expected {' or '.join(baseline.on_long)}")
    if wrong:
        raise ConfigError(problems(f"method {config.method!r}", wrong))


def _resolved(config: RunConfig, baseline: Baseline, rows: Rows) -> RunConfig:
    settings: dict[str, Any] = {key: value for key, value in baseline.to_dict().items() if key != "method"}
    return config.changed(
        task=rows.task,
        columns=roles_of(rows.layout),
        settings=settings,
        max_length=rows.max_length,
        on_long=rows.on_long,
        data=absolute(config.data),
        eval_data=None if config.eval_data is None else absolute(config.eval_data),
        base=None if config.base is None else absolute(config.base),
        out=str(Path(config.out).expanduser().resolve()),
    )


def _record(config: RunConfig, rows: Rows, held: Any) -> TrainingRecord:
    digests = {"train": rows_fingerprint(rows.dataset)} | ({} if held is None else {"eval": rows_fingerprint(held)})
    return TrainingRecord(
        task=rows.task,
        base=config.base,
        labels=rows.labels,
        columns=config.columns,
        kind=rows.layout.kind,
        prompt_template=config.prompt_template,
        separator=config.separator,
        max_length=rows.max_length,
        data=digests,
        versions=versions(),
    )
