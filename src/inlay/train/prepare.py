"""From a configuration to a model with its adapter, encoded rows and the resolved configuration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inlay.core.errors import ConfigError, DataError, problems
from inlay.core.method import Method
from inlay.train.config import RunConfig, Task
from inlay.train.hyper import build_method, check_fields
from inlay.train.loading import Base, base_source, load_base, read_config
from inlay.train.members import located, standing
from inlay.train.optimizers import check_optimizer
from inlay.train.packing import PackingCollator, packs
from inlay.train.record import TrainingRecord, versions

if TYPE_CHECKING:
    from datasets import Dataset

    from inlay.core.adapter import Adapter
    from inlay.data import Layout

SHARED = tuple(n for n in ("precision", "quantize", "gradient_checkpointing") if n in RunConfig.model_fields)
USUAL_EPOCHS, MOST_EPOCHS, FEWEST_STEPS = 3, 20, 250
FEWEST_TO_SPLIT = 20  # rows; holding one out of fewer says nothing and costs too much
UNBOUNDED_CONTEXT = 1024  # tokens, where a base states no limit
ROWS_TO_INITIALISE = 512  # of the training rows, for methods that are initialised from data
TEXT_WINDOW = 1024  # tokens; plain text is cut into rows, which need not be as long as the longest contexts


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything a run needs before its first step.

    Attributes:
        config: resolved: nothing left to be found out.
        identity: digests of rows and base; a resumed run must have the same.
    """

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
    """Read, check, load and encode; nothing is written.

    Args:
        beside: a run that is prepared already. This one shares its base, with an adapter of its own there, and
            everything drawn at random is what it would be alone.

    Raises:
        UserError: whatever is wrong with configuration, data or base.
    """
    from transformers import set_seed

    from inlay.core.fingerprint import fingerprint as base_fingerprint
    from inlay.data import collate
    from inlay.data import fingerprint as rows_fingerprint

    method = located(build_method(config.method, config.settings))
    _check_reporters(config)
    check_optimizer(config.optimizer)
    source = absolute(base_source(config.base))
    rows, held, layout = read_rows(config)
    task = config.task or guess_task(layout, source)
    labels = _labels(rows, layout, task)
    rows, held = split_rows(rows, held, config)
    set_seed(config.seed)  # a fresh head and the adapter are drawn from it
    own = _loader(beside)(
        source if config.base else None,
        task=task,
        label_names=labels,
        dtype=dtype_of(config),
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
    base_parameters = beside.base_parameters if beside else sum(p.numel() for p in base.model.parameters())
    # What is initialised from data needs the rows first; what takes room in the context is attached before them.
    adapter = None if method.needs_data else _attach(base, method, config)
    config = config.changed(max_length=_max_length(config, layout, base, adapter), on_long=_on_long(config, layout))
    train = _encode(rows, layout, base, task, labels, config)
    collator: Any = collate(base.tokenizer, task)
    if adapter is None:
        adapter = _attach(base, method, config, _batches(train, collator, config))
    if own is not base:
        _take_heads(adapter, own.model)
    config = config.changed(packing=packs(config, task, base.model, adapter, train))
    collator = PackingCollator(collator) if config.packing else collator
    held_out = None if held is None else _by_length(_encode(held, layout, base, task, labels, config))
    per_epoch = math.ceil(math.ceil(len(train) / config.batch_size) / config.accumulate)
    epochs = config.epochs or default_epochs(per_epoch)
    config = config.changed(epochs=epochs)
    total_steps = config.steps or math.ceil(epochs * per_epoch)
    adapter.method = adapter.method.for_steps(total_steps)
    config = _resolved(config, task, method, layout, per_epoch, total_steps)
    digests = {"train": rows_fingerprint(train)} | ({} if held_out is None else {"eval": rows_fingerprint(held_out)})
    record = TrainingRecord(
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
    return Prepared(
        config=config,
        task=task,
        method=adapter.method,
        base=base,
        adapter=adapter,
        base_parameters=base_parameters,
        train=train,
        held_out=held_out,
        collator=collator,
        total_steps=total_steps,
        record=record,
        identity={"data": digests, "base": base_fingerprint(base.model, without=adapter.copies).to_dict()},
    )


def _attach(base: Base, method: Method, config: RunConfig, data: list[Any] | None = None) -> Adapter:
    import inlay

    there = inlay.adapters(base.model)
    with inlay.use(base.model, None) if there else nullcontext():  # what is read of the base is the base's
        return _attached(base, method, config, _free_name(config.name, there), data)


def _attached(base: Base, method: Method, config: RunConfig, name: str, data: list[Any] | None) -> Adapter:
    import inlay

    with standing(base.model, method, [name]) as made:
        return inlay.attach(
            base.model,
            made,
            name=name,
            where=_where(config, method),
            layers=config.layers,
            modules_to_save=list(dict.fromkeys([*config.modules_to_save, *base.fresh])),
            data=data,
        )


def _free_name(name: str, there: Collection[str]) -> str:
    """The adapter's name, or one like it where another run on the same base has that."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in there)


def _loader(beside: Prepared | None) -> Callable[..., Base]:
    """`load_base`, unless there is nothing in the base that is drawn afresh for each run."""
    if beside is None or beside.base.fresh:
        return load_base
    return lambda *_, **__: beside.base


def _take_heads(adapter: Adapter, own: Any) -> None:
    """Heads that were made afresh for this run, in the place of those of the base that it shares."""
    import torch

    values = dict(own.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, copy in adapter.copies.items():
            copy.copy_(values[name])


def _check_beside(config: RunConfig, task: str, labels: list[str] | None, beside: Prepared) -> None:
    """Whether a run can share the base of another."""
    other = beside.config
    pairs: dict[str, tuple[Any, Any]] = {
        "base": (absolute(base_source(config.base)), absolute(base_source(other.base))),
        "task": (task, beside.task),
        "labels": (labels, None if beside.record.labels is None else list(beside.record.labels)),
        **{name: (getattr(config, name), getattr(other, name)) for name in SHARED},
    }
    wrong = [f"{name} is {a!r}, but {b!r} in {other.out}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise ConfigError(problems(f"{config.out} cannot share a base with the runs it is trained with", wrong))


def _batches(rows: Dataset, collator: Any, config: RunConfig) -> list[Any]:
    """Training rows to initialise from: at most a few hundred, drawn by the seed."""
    order = np.random.default_rng(config.seed).permutation(len(rows))[:ROWS_TO_INITIALISE]
    cuts = range(0, len(order), config.batch_size)
    return [collator([rows[int(i)] for i in order[at : at + config.batch_size]]) for at in cuts]


def default_epochs(steps_per_epoch: int) -> float:
    """Three, or of few rows as many as make 250 steps, at most twenty: a rate cannot rise and fall in ten steps."""
    return float(max(USUAL_EPOCHS, min(MOST_EPOCHS, math.ceil(FEWEST_STEPS / steps_per_epoch))))


def read_rows(config: RunConfig) -> tuple[Dataset, Dataset | None, Layout]:
    """Both tables as read, and the layout they share."""
    from inlay.data import Reading, read_table, resolve_columns

    reading = Reading(**check_fields(Reading, config.reading, heading="reading", noun="option"))
    rows = read_table(config.data, split=config.split, reading=reading)
    layout = resolve_columns(rows, config.columns, task=config.task)
    if config.eval_data is None and config.eval_split is None:
        return rows, None, layout
    source = config.eval_data or config.data  # a split of the same data set may be held out
    held = read_table(source, split=config.eval_split, reading=reading)
    try:
        other = resolve_columns(held, roles_of(layout), task=config.task)
    except DataError as error:
        raise DataError(f"{source} must have the columns of {config.data}: {error}") from error
    if other.kind != layout.kind and {other.kind, layout.kind} != {"classification", "regression"}:
        raise DataError(f"{source} is {other.kind} data, but {config.data} is {layout.kind} data")
    return rows, held, layout


def guess_task(layout: Layout, source: str) -> Task:
    """The task that columns and base suggest."""
    if layout.kind in ("classification", "regression"):
        return layout.kind
    encoder_decoder = bool(getattr(read_config(source), "is_encoder_decoder", False))
    return "seq2seq" if layout.kind == "completion" and encoder_decoder else "causal"


def _labels(rows: Dataset, layout: Layout, task: Task) -> list[str] | None:
    from inlay.data import labels_of

    return labels_of(rows, layout) if task == "classification" else None


def split_rows(rows: Dataset, held: Dataset | None, config: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Hold rows out for evaluation, drawn by the seed, where no file for it is given."""
    if held is not None or config.eval_share == 0:
        return rows, held
    if len(rows) < FEWEST_TO_SPLIT:
        if config.early_stopping:
            raise DataError(
                f"{config.data} has {len(rows)} rows, too few to hold some out for early stopping (at least "
                f"{FEWEST_TO_SPLIT}). Give --eval-data, or leave --early-stopping out"
            )
        return rows, None
    order = np.random.default_rng(config.seed).permutation(len(rows))
    count = max(1, round(len(rows) * config.eval_share))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def _encode(
    rows: Dataset, layout: Layout, base: Base, task: Task, labels: list[str] | None, config: RunConfig
) -> Dataset:
    from inlay.data import Template, encode

    assert config.max_length is not None and config.on_long is not None
    return encode(
        rows,
        layout,
        base.tokenizer,
        task=task,
        max_length=config.max_length,
        label_names=labels,
        template=Template(prompt=config.prompt_template, separator=config.separator),
        on_long=config.on_long,
    )


def _by_length(rows: Dataset) -> Dataset:
    """Longest first: least padding, and too much memory shows at once."""
    return rows.select(np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable"))


def _max_length(config: RunConfig, layout: Layout, base: Base, adapter: Adapter | None) -> int:
    """The longest row the base can read beside the adapter's virtual tokens."""
    context, virtual = context_of(base.model, base.tokenizer), 0 if adapter is None else _virtual_tokens(adapter)
    room = (context or UNBOUNDED_CONTEXT) - virtual
    if room < 2:
        raise ConfigError(
            f"{virtual} virtual tokens leave no room for text in a context of {context}. Give a smaller length"
        )
    if config.max_length is None:
        return min(room, TEXT_WINDOW) if layout.kind == "text" else room
    if context is not None and config.max_length > room:
        beside = f", {virtual} of them taken by the soft prompt" if virtual else ""
        raise ConfigError(
            f"max_length is {config.max_length}, but the base reads {context} tokens{beside}. Give at most {room}"
        )
    return config.max_length


def context_of(model: Any, tokenizer: Any) -> int | None:
    """Tokens a base can read, None where it states no limit."""
    from torch import nn

    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the padding index on.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            stated = module.num_embeddings - module.padding_idx - 1
    limits = [int(n) for n in (stated, tokenizer.model_max_length) if n is not None and 0 < n < 10**9]
    return min(limits, default=None)


def _virtual_tokens(adapter: Adapter) -> int:
    from inlay.core.pieces import PromptPiece
    from inlay.core.prompt import TokenPrompt

    prompts = [piece.prompt for piece in adapter.pieces if isinstance(piece, PromptPiece)]
    return sum(prompt.length for prompt in prompts if isinstance(prompt, TokenPrompt))


def _on_long(config: RunConfig, layout: Layout) -> str:
    return config.on_long or ("split" if layout.kind == "text" else "error")


def _where(config: RunConfig, method: Method) -> Any:
    import re

    if config.where is None and config.quantize and method.family == "low rank":
        return "all-linear"  # QLoRA: adapters at every linear layer make up for what 4 bits lose
    if isinstance(config.where, str) and config.where.startswith("re:"):
        try:
            return re.compile(config.where.removeprefix("re:"))
        except re.error as error:
            raise ConfigError(f"where={config.where!r} is not a regular expression: {error}") from error
    return config.where


def dtype_of(config: RunConfig) -> Any:
    """The torch type that a configuration asks for, None for the base's own."""
    import torch

    return {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]


def roles_of(layout: Layout) -> dict[str, str]:
    """Role → column, as a configuration states it."""
    from inlay.data.columns import ROLES

    return {role: column for role in ROLES if (column := getattr(layout, role)) is not None}


def _resolved(config: RunConfig, task: Task, method: Method, layout: Layout, per_epoch: int, total: int) -> RunConfig:
    """Everything that was found out, and absolute paths, so that the saved file says it all."""
    recipe = method.recipe
    every = config.eval_every or (per_epoch if total >= 2 * per_epoch else max(1, total // 4))
    return config.changed(
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


def absolute(source: str) -> str:
    """A local path in full; a hub id as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _check_reporters(config: RunConfig) -> None:
    from importlib.util import find_spec

    missing = [name for name in config.report_to if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report_to={','.join(missing)} needs a package that is not installed: pip install {' '.join(missing)}"
        )
