"""Rows with a separate target: for encoder–decoders, classifiers and regressors."""

from __future__ import annotations

from inlay.data.job import Encoded, Job
from inlay.data.labels import label_ids, numbers
from inlay.data.prompting import completions_of, prompts_of, source_ids
from inlay.data.rows import Rows


def encode_translations(rows: Rows, job: Job) -> list[list[Encoded] | None]:
    """The prompt for the encoder; completion and end token as the target. Texts that are too long lose their end."""
    out: list[list[Encoded] | None] = []
    prompts = prompts_of(rows, job.layout, job.template)
    for source, target in zip(prompts, completions_of(rows, job.layout, job.named), strict=True):
        if source is None or target is None:
            out.append(None)
            continue
        ids = source_ids(source, job.tokenizer)
        labels = list(job.tokenizer(text_target=target, verbose=False)["input_ids"])
        end = job.tokenizer.eos_token_id
        if job.template.end and end is not None and (not labels or labels[-1] != end):
            labels.append(end)
        length = max(len(ids), len(labels))
        if len(ids) > job.max_length:
            ids = list(job.tokenizer(source, truncation=True, max_length=job.max_length)["input_ids"])
        out.append([Encoded(ids, labels[: job.max_length], length)])
    return out


def encode_labelled(rows: Rows, job: Job) -> list[list[Encoded] | None]:
    """The text, or the pair of texts, with a class or a number. Rows that are too long lose the longer text's end."""
    layout, second = job.layout, job.layout.pair
    texts = [rows.text(row, layout.column("text"), may_be_empty=True) for row in range(len(rows))]
    pairs = [rows.text(row, second, may_be_empty=True) if second else "" for row in range(len(rows))]
    labels = _targets(rows, job)
    out: list[list[Encoded] | None] = []
    for row, (text, pair, label) in enumerate(zip(texts, pairs, labels, strict=True)):
        if text is None or pair is None or label is None:
            out.append(None)
            continue
        both = (text, pair) if second else (text,)
        whole = job.tokenizer(*both, verbose=False)
        length = len(whole["input_ids"])
        if length > job.max_length:
            whole = job.tokenizer(*both, truncation=True, max_length=job.max_length)
        if length == 0:
            rows.found.add(f"{rows.places[row]}: {layout.text!r} has no tokens", "Fill in the text, or remove the row.")
            out.append(None)
            continue
        out.append([Encoded(list(whole["input_ids"]), label, length, whole.get("token_type_ids"))])
    return out


def _targets(rows: Rows, job: Job) -> list[int | None] | list[float | None]:
    column = job.layout.column("label")
    if job.task == "regression":
        return numbers(rows, column)
    return label_ids(rows, column, job.named, job.label_names)
