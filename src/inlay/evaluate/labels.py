"""Labels as text that a language model can answer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inlay.core.errors import DataError, nearest, problems
from inlay.data import Task, Template
from inlay.data.joining import Joiner

_LISTED = 10


def label_tokens(tokenizer: Any, names: Sequence[str], task: Task, template: Template) -> list[list[int]]:
    """The tokens of each label as training writes it after a prompt, including the end token."""
    end = [int(tokenizer.eos_token_id)] if template.end and tokenizer.eos_token_id is not None else []
    if task == "seq2seq":
        found = [list(tokenizer(text_target=name, verbose=False)["input_ids"]) for name in names]
    else:
        found = [pieces[1] for pieces in Joiner(tokenizer).pieces([[template.separator, n] for n in names])]
    return [ids if end and ids[-1:] == end else ids + end for ids in found]


def check_labels(references: Sequence[str], places: Sequence[str], names: Sequence[str]) -> None:
    """Raise one `DataError` that lists the places of rows whose label is not one of `names`."""
    wrong = [
        f"{place}: label {label!r} was never seen in training{nearest(label, names)}"
        for place, label in zip(places, references, strict=True)
        if label not in names
    ]
    if len(wrong) > _LISTED:
        wrong = [*wrong[:_LISTED], f"and {len(wrong) - _LISTED} more"]
    if wrong:
        raise DataError(problems("the data cannot be used; correct or remove these rows", wrong))
