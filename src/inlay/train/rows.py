"""The rows of a run: read, split, and encoded to the length that base and adapter allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from inlay.core.errors import ConfigError, DataError
from inlay.train.config import RunConfig, Task
from inlay.train.hyper import check_fields
from inlay.train.loading import Base, read_config

if TYPE_CHECKING:
    from datasets import Dataset

    from inlay.core.contracts.adapter import Adapter
    from inlay.data import Layout

FEWEST_TO_SPLIT = 20  # rows; of fewer, holding some out costs too much and tells too little
UNBOUNDED_CONTEXT = 1024  # tokens, for a base without a stated limit
TEXT_WINDOW = 1024  # tokens; plain text is cut into rows, which need not fill the longest contexts


def read_rows(config: RunConfig) -> tuple[Dataset, Dataset | None, Layout]:
    """The training table, the evaluation table (or None), and the layout they share."""
    from inlay.data import Reading, read_table, resolve_columns

    reading = Reading(**check_fields(Reading, config.reading, heading="reading", noun="option"))
    rows = read_table(config.data, split=config.split, reading=reading)
    layout = resolve_columns(rows, config.columns, task=config.task)
    if config.eval_data is None and config.eval_split is None:
        return rows, None, layout
    source = config.eval_data or config.data  # it may be a split of the same data set
    held = read_table(source, split=config.eval_split, reading=reading)
    try:
        other = resolve_columns(held, roles_of(layout), task=config.task)
    except DataError as error:
        raise DataError(f"{source} must have the columns of {config.data}: {error}") from error
    if other.kind != layout.kind and {other.kind, layout.kind} != {"classification", "regression"}:
        raise DataError(f"{source} is {other.kind} data, but {config.data} is {layout.kind} data")
    return rows, held, layout


def guess_task(layout: Layout, source: str) -> Task:
    """The most likely task for these columns and this base."""
    if layout.kind in ("classification", "regression"):
        return layout.kind
    encoder_decoder = bool(getattr(read_config(source), "is_encoder_decoder", False))
    return "seq2seq" if layout.kind == "completion" and encoder_decoder else "causal"


def labels_for(rows: Dataset, layout: Layout, task: Task) -> list[str] | None:
    from inlay.data import labels_of

    return labels_of(rows, layout) if task == "classification" else None


def answers_for(rows: Dataset, layout: Layout, labels: list[str] | None) -> list[str] | None:
    """The labels among which evaluation chooses, including those with which a language model answers."""
    from inlay.data import labels_of

    if labels is not None or layout.kind != "classification":
        return labels
    try:
        return labels_of(rows, layout)
    except DataError:  # there is only one label, so nothing to choose from
        return None


def split_rows(rows: Dataset, held: Dataset | None, config: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Hold rows out for evaluation, drawn with the seed, if no file is given for it."""
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


def encoded(
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


def longest_first(rows: Dataset) -> Dataset:
    """Sort rows, longest first: least padding, and a lack of memory shows at once."""
    return rows.select(np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable"))


def max_length_of(config: RunConfig, layout: Layout, base: Base, adapter: Adapter | None) -> int:
    """The longest row that the base can read in addition to the adapter's virtual tokens."""
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
    """The number of tokens a base can read; None if there is no stated limit."""
    from inlay.bases.context import stated_context

    limits = [stated_context(model), tokenizer.model_max_length]
    return min((int(n) for n in limits if n is not None and 0 < n < 10**9), default=None)


def _virtual_tokens(adapter: Adapter) -> int:
    from inlay.core.contracts.pieces import PromptPiece
    from inlay.core.contracts.prompt import TokenPrompt

    prompts = [piece.prompt for piece in adapter.pieces if isinstance(piece, PromptPiece)]
    return sum(prompt.length for prompt in prompts if isinstance(prompt, TokenPrompt))


def on_long_of(config: RunConfig, layout: Layout) -> str:
    return config.on_long or ("split" if layout.kind == "text" else "error")


def roles_of(layout: Layout) -> dict[str, str]:
    """Role → column, as in a configuration."""
    from inlay.data.columns import ROLES

    return {role: column for role in ROLES if (column := getattr(layout, role)) is not None}
