"""From rows to token ids and labels, for every task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from inlay.core.errors import ConfigError
from inlay.data.causal import encode_chats, encode_completions, encode_texts
from inlay.data.columns import Layout, Task
from inlay.data.digest import fingerprint
from inlay.data.findings import Findings
from inlay.data.job import Encoded, Job, OnLong
from inlay.data.joining import Joiner
from inlay.data.labels import class_names, labels_of
from inlay.data.paired import encode_labelled, encode_translations
from inlay.data.rows import Rows
from inlay.data.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 512
_DEFAULT = Template()
_log = logging.getLogger("inlay.data")
_LONG = (
    "Raise max_length (up to what the base can read), shorten the rows, or choose on_long: truncate, drop, "
    "or for plain text split."
)
_NOTHING = "Raise max_length, shorten the text before the scored part, or remove the row."

# Rows → encodings of each row (several if it is split); `None` for a row with a problem.
Encoder = Callable[[Rows], list[list[Encoded] | None]]


def encode(
    dataset: Dataset,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task,
    max_length: int,
    label_names: Sequence[str] | None = None,
    template: Template = _DEFAULT,
    on_long: OnLong = "error",
) -> Dataset:
    """Encode every row. Exactly the completion is scored (or the assistant's turns, or the text).

    Args:
        dataset: from `read_table`, or any data set.
        layout: from `resolve_columns`.
        tokenizer: the base's tokenizer.
        task: ``causal``, ``seq2seq``, ``classification`` or ``regression``.
        max_length: most tokens of a row (in seq2seq, of source and of target each). Virtual tokens of a soft prompt
            come on top, so subtract them.
        label_names: the label vocabulary of the training data (`labels_of`); needed for other splits. None takes it
            from these rows.
        template: how prompt and completion are joined.
        on_long: what to do with rows longer than `max_length`. ``error`` refuses them, ``drop`` leaves
            them out, ``split`` cuts plain text into several rows, ``truncate`` first removes the beginning of a
            prompt, then the end of the completion, and the end of all other texts. The number of such rows is
            logged (``inlay.data``, level info).

    Returns:
        Columns ``input_ids``, ``attention_mask`` and ``labels``: for causal and seq2seq lists of ints with
        `IGNORED` at tokens that are not scored; for classification the class, for regression the number.
        ``token_type_ids`` for classifiers whose tokenizer gives them.

    Raises:
        DataError: everything that is wrong with the rows, in one message.
        ConfigError: an option is unknown, or the tokenizer lacks something that the task needs.
    """
    if task == "classification" and layout.kind == "classification" and label_names is None:
        label_names = labels_of(dataset, layout)
    job = Job(
        layout=layout,
        tokenizer=tokenizer,
        task=task,
        max_length=max_length,
        template=template,
        on_long=on_long,
        label_names=label_names or (),
        named=class_names(dataset, layout.label) if layout.label else None,
    )
    template.check([*dataset.column_names, "prompt", "text", "pair"])
    found = Findings("the data cannot be used")
    encoder, features = _encoder(job), _features(job)
    tables, lengths, kept = [], list[int](), 0
    for start in range(0, len(dataset), _BATCH):
        rows = Rows.of(dataset[start : start + _BATCH], start, found)
        all_encodings = encoder(rows)
        good = [e for row, some in enumerate(all_encodings) if some for e in _usable(some, rows, row, job)]
        lengths += [some[0].length for some in all_encodings if some]
        kept += len(good)
        tables.append(_table(good, features))
    if not kept and not found.count:
        found.add(f"all {len(dataset)} rows are longer than {max_length} tokens, so none is left", _LONG)
    long = sum(length > max_length for length in lengths)
    found.hint(
        _LONG,
        f"Of {len(dataset)} rows {long} are too long; the longest has {max(lengths, default=0)} tokens.",
    )
    found.raise_if_any()
    if long:
        _log.info("%d of %d rows are longer than %d tokens: %s", long, len(dataset), max_length, on_long)
    table = pa.concat_tables(tables)
    # Otherwise datasets pickles the whole table to compute one.
    return Dataset(table, fingerprint=fingerprint(Dataset(table, fingerprint="encoded"))[:32])


def _usable(encodings: list[Encoded], rows: Rows, row: int, job: Job) -> list[Encoded]:
    length = encodings[0].length
    if length > job.max_length and job.on_long == "error":
        rows.found.add(f"{rows.places[row]} has {length} tokens, more than {job.max_length}", _LONG)
        return []
    if length > job.max_length and job.on_long == "drop":
        return []
    good = [encoding for encoding in encodings if encoding.scored]
    if not good:
        rows.found.add(f"{rows.places[row]}: no token is left to score", _NOTHING)
    return good


def _encoder(job: Job) -> Encoder:
    match job.task:
        case "classification" | "regression":
            return partial(encode_labelled, job=job)
        case "seq2seq":
            return partial(encode_translations, job=job)
    joiner = Joiner(job.tokenizer)
    if job.max_length <= len(joiner.lead):
        raise ConfigError(f"max_length={job.max_length} leaves no room after the tokenizer's leading tokens")
    match job.layout.kind:
        case "chat":
            return partial(encode_chats, job=job, joiner=joiner)
        case "text":
            return partial(encode_texts, job=job, joiner=joiner)
    return partial(encode_completions, job=job, joiner=joiner)


def _features(job: Job) -> Features:
    labels: dict[str, Any] = {"classification": Value("int64"), "regression": Value("float32")}
    columns: dict[str, Any] = {
        "input_ids": List(Value("int32")),
        "attention_mask": List(Value("int8")),
        "labels": labels.get(job.task, List(Value("int32"))),
    }
    if job.task in labels and "token_type_ids" in job.tokenizer.model_input_names:
        columns["token_type_ids"] = List(Value("int8"))
    return Features(columns)


def _table(rows: Sequence[Encoded], features: Features) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "input_ids": [row.input_ids for row in rows],
        "attention_mask": [[1] * len(row.input_ids) for row in rows],
        "labels": [row.labels for row in rows],
    }
    if "token_type_ids" in features:
        columns["token_type_ids"] = [row.segments or [0] * len(row.input_ids) for row in rows]
    return pa.Table.from_pydict(columns, schema=features.arrow_schema)
