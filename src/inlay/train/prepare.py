"""From a configuration to a model with its adapter, encoded rows (`rows.py`) and the resolved configuration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inlay.core.contracts.method import Method
from inlay.core.errors import ConfigError, problems
from inlay.train.config import RunConfig, Task
from inlay.train.hyper import build_method, usual_places
from inlay.train.loading import Base, absolute, base_source, load_base, precision_for
from inlay.train.members import located, standing
from inlay.train.optimizers import check_optimizer
from inlay.train.packing import PackingCollator, packs
from inlay.train.record import TrainingRecord, versions
from inlay.train.rows import (
    answers_for,
    encoded,
    guess_task,
    labels_for,
    longest_first,
    max_length_of,
    on_long_of,
    read_rows,
    roles_of,
    split_rows,
)
from inlay.train.words import places

if TYPE_CHECKING:
    from datasets import Dataset

    from inlay.core.contracts.adapter import Adapter
    from inlay.data import Layout

SHARED = tuple(n for n in ("precision", "quantize", "gradient_checkpointing") if n in RunConfig.model_fields)
USUAL_EPOCHS, MOST_EPOCHS, FEWEST_STEPS = 3, 20, 250
ROWS_TO_INITIALISE = 512  # training rows, for methods that are initialised from data


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything a run needs before its first step.

    Attributes:
        config: resolved, with nothing left to find out.
        identity: digests of rows and base, which must be the same when the run is resumed.
        precision: the line that tells in which precision the run computes, and why.
    """

    precision: str
    config: RunConfig
    task: Task
    method: Method
    base: Base
    adapter: Adapter
    base_parameters: int
    train: Dataset
    held_out: Dataset | None
    collator: Any
    total_steps: int
    record: TrainingRecord
    identity: dict[str, Any]


def prepare(config: RunConfig, *, beside: Prepared | None = None) -> Prepared:
    """Read, check, load and encode everything; nothing is written.

    Args:
        beside: a run that is prepared already. The new one shares its base, with its own adapter, and draws the same
            random numbers as it would alone.

    Raises:
        UserError: something is wrong with configuration, data or base.
    """
    from transformers import set_seed

    from inlay.core.model.fingerprint import fingerprint as base_fingerprint
    from inlay.data import collate
    from inlay.data import fingerprint as rows_fingerprint

    method = located(build_method(config.method, config.settings))
    _check_reporters(config)
    check_optimizer(config.optimizer)
    rows, held, layout = read_rows(config)
    task = config.task or guess_task(layout, absolute(base_source(config.base)))
    labels = labels_for(rows, layout, task)
    answers = answers_for(rows, layout, labels)
    rows, held = split_rows(rows, held, config)
    chosen = precision_for(config.base, config.precision, quantize=config.quantize)
    config = config.changed(precision=chosen.precision)
    set_seed(config.seed)  # a new head and the adapter are drawn with it
    own, base = _bases(config, layout, task, labels, beside)
    base_parameters = beside.base_parameters if beside else sum(p.numel() for p in base.model.parameters())
    # A method that is initialised from data needs the rows first; others may take room in the context, so they come
    # first.
    adapter = None if method.needs_data else _attach(base, method, config)
    config = config.changed(max_length=max_length_of(config, layout, base, adapter), on_long=on_long_of(config, layout))
    train = encoded(rows, layout, base, task, labels, config)
    # As in evaluation: with padding on the left, positions that a model counts itself would start at the padding.
    collator: Any = replace(collate(base.tokenizer, task), side="right")
    if adapter is None:
        adapter = _attach(base, method, config, _batches(train, collator, config))
    if own is not base:
        _take_heads(adapter, own.model)
    config = config.changed(packing=packs(config, task, base.model, adapter, train))
    held_out = None if held is None else longest_first(encoded(held, layout, base, task, labels, config))
    config, total_steps = _resolved(config, task, method, layout, len(train))
    adapter.method = adapter.method.for_steps(total_steps)
    digests = {"train": rows_fingerprint(train)} | ({} if held_out is None else {"eval": rows_fingerprint(held_out)})
    return Prepared(
        precision=str(chosen),
        config=config,
        task=task,
        method=adapter.method,
        base=base,
        adapter=adapter,
        base_parameters=base_parameters,
        train=train,
        held_out=held_out,
        collator=PackingCollator(collator) if config.packing else collator,
        total_steps=total_steps,
        record=_record(config, layout, task, answers, digests),
        identity={"data": digests, "base": base_fingerprint(base.model, without=adapter.copies).to_dict()},
    )


def _bases(
    config: RunConfig, layout: Layout, task: Task, labels: list[str] | None, beside: Prepared | None
) -> tuple[Base, Base]:
    """The base as this run would load it alone, and the base it uses; the same unless it shares one."""
    source = absolute(base_source(config.base))
    own = _loader(beside)(
        source if config.base else None,
        task=task,
        label_names=labels,
        precision=config.precision,
        quantize=config.quantize,
    )
    base = own if beside is None else beside.base
    if beside is not None:
        _check_beside(config, task, labels, beside)
    if layout.kind == "chat" and not base.tokenizer.chat_template:
        raise ConfigError(
            f"{config.data} holds chats, but the tokenizer of the base {source} has no chat template. Give a base "
            "that was trained on chats, or data with `prompt` and `completion`"
        )
    return own, base


def _record(
    config: RunConfig, layout: Layout, task: Task, labels: list[str] | None, digests: dict[str, str]
) -> TrainingRecord:
    return TrainingRecord(
        task=task,
        base=config.base,
        labels=None if labels is None else tuple(labels),
        columns=config.columns,
        kind=layout.kind,
        prompt_template=config.prompt_template,
        separator=config.separator,
        max_length=config.max_length or 0,
        data=digests,
        versions=versions(),
        quantize=config.quantize,
    )


def _attach(base: Base, method: Method, config: RunConfig, data: list[Any] | None = None) -> Adapter:
    import inlay

    there = inlay.adapters(base.model)
    with inlay.use(base.model, None) if there else nullcontext():  # so that the base itself is read
        return _attached(base, method, config, _free_name(config.name, there), data)


def _attached(base: Base, method: Method, config: RunConfig, name: str, data: list[Any] | None) -> Adapter:
    import inlay

    with standing(base.model, method, [name]) as made:
        return inlay.attach(
            base.model,
            made,
            name=name,
            where=usual_places(method, config.quantize) if config.where is None else places(config.where),
            layers=config.layers,
            modules_to_save=list(dict.fromkeys([*config.modules_to_save, *base.fresh])),
            data=data,
        )


def _free_name(name: str, there: Collection[str]) -> str:
    """The adapter's name, with a number if another run on the same base has it already."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in there)


def _loader(beside: Prepared | None) -> Callable[..., Base]:
    """`load_base`; or the shared base, if nothing in it is drawn anew for each run."""
    if beside is None or beside.base.fresh:
        return load_base
    return lambda *_, **__: beside.base


def _take_heads(adapter: Adapter, own: Any) -> None:
    """Replace the shared base's new heads by those that were drawn for this run."""
    import torch

    values = dict(own.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, copy in adapter.copies.items():
            copy.copy_(values[name])


def _check_beside(config: RunConfig, task: str, labels: list[str] | None, beside: Prepared) -> None:
    """Raise if a run cannot share the base of another."""
    other = beside.config
    pairs: dict[str, tuple[Any, Any]] = {
        "base": (absolute(base_source(config.base)), absolute(base_source(other.base))),
        "task": (task, beside.task),
        "labels": (labels, list(beside.record.labels or ()) if beside.task == "classification" else None),
        **{name: (getattr(config, name), getattr(other, name)) for name in SHARED},
    }
    wrong = [f"{name} is {a!r}, but {b!r} in {other.out}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise ConfigError(problems(f"{config.out} cannot share a base with the runs it is trained with", wrong))


def _batches(rows: Dataset, collator: Any, config: RunConfig) -> list[Any]:
    """Training rows for initialisation: at most a few hundred, drawn with the seed."""
    order = np.random.default_rng(config.seed).permutation(len(rows))[:ROWS_TO_INITIALISE]
    cuts = range(0, len(order), config.batch_size)
    return [collator([rows[int(i)] for i in order[at : at + config.batch_size]]) for at in cuts]


def default_epochs(steps_per_epoch: int) -> float:
    """Three, or more if the rows are few: enough for 250 steps, at most twenty. Ten steps are no schedule."""
    return float(max(USUAL_EPOCHS, min(MOST_EPOCHS, math.ceil(FEWEST_STEPS / steps_per_epoch))))


def _resolved(config: RunConfig, task: Task, method: Method, layout: Layout, rows: int) -> tuple[RunConfig, int]:
    """The configuration with everything found out filled in and absolute paths; and the run's number of steps."""
    recipe = method.recipe
    per_epoch = math.ceil(math.ceil(rows / config.batch_size) / config.accumulate)
    epochs = config.epochs or default_epochs(per_epoch)
    total = config.steps or math.ceil(epochs * per_epoch)
    every = config.eval_every or (per_epoch if total >= 2 * per_epoch else max(1, total // 4))
    resolved = config.changed(
        epochs=epochs,
        task=task,
        columns=roles_of(layout),
        settings={key: value for key, value in method.to_dict().items() if key != "method"},
        learning_rate=config.learning_rate or recipe.learning_rate,
        schedule=config.schedule or recipe.schedule,
        warmup=recipe.warmup if config.warmup is None else config.warmup,
        weight_decay=recipe.weight_decay if config.weight_decay is None else config.weight_decay,
        eval_every=every,
        save_every=config.save_every or every,
        data=absolute(config.data),
        eval_data=None if config.eval_data is None else absolute(config.eval_data),
        base=None if config.base is None else absolute(config.base),
        out=str(Path(config.out).expanduser().resolve()),
    )
    return resolved, total


def _check_reporters(config: RunConfig) -> None:
    from importlib.util import find_spec

    missing = [name for name in config.report_to if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report_to={','.join(missing)} needs a package that is not installed: pip install {' '.join(missing)}"
        )
