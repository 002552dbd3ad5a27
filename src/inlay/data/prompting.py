"""Prompts and references: the text from which generation starts, the same as in training, and the expected answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from inlay.core.errors import DataError
from inlay.data.chat import chat_pieces, split_last_turn
from inlay.data.columns import Layout, Task
from inlay.data.findings import Findings
from inlay.data.joining import Joiner
from inlay.data.labels import class_names, label_names
from inlay.data.rows import Rows
from inlay.data.template import Template

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_BATCH = 512
_DEFAULT = Template()


class Prompt(NamedTuple):
    """The text from which generation starts, and the expected answer.

    Attributes:
        text: the prompt as the model reads it, separator included.
        input_ids: its tokens, the same as those in front of the scored ones in training.
        reference: the completion, the last assistant turn or the label's name.
    """

    text: str
    input_ids: list[int]
    reference: str


def prompts(
    dataset: Dataset,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task,
    template: Template = _DEFAULT,
) -> list[Prompt]:
    """The prompt and the reference of every row, in order. A chat's reference is its last assistant turn.

    Raises:
        DataError: rows that cannot be used, or data without a reference (plain text).
    """
    if layout.kind in ("text", "regression"):
        raise DataError(f"{layout.kind} data has no completion to compare with. Use prompt and completion")
    found = Findings("the data cannot be used")
    joiner = Joiner(tokenizer)
    named = class_names(dataset, layout.label) if layout.label else None
    out: list[Prompt] = []
    for start in range(0, len(dataset), _BATCH):
        rows = Rows.of(dataset[start : start + _BATCH], start, found)
        if layout.kind == "chat":
            chats = (_chat_prompt(rows, row, layout, tokenizer, joiner) for row in range(len(rows)))
            out += [prompt for prompt in chats if prompt is not None]
            continue
        both = zip(
            prompts_of(rows, layout, template),
            completions_of(rows, layout, named),
            strict=True,
        )
        for text, wanted in both:
            if text is not None and wanted is not None:
                out.append(Prompt(*_ids(text, tokenizer, joiner, task, template), wanted))
    found.raise_if_any()
    return out


def encode_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, *, task: Task, template: Template = _DEFAULT
) -> list[int]:
    """The tokens of one prompt typed by hand, written as in training.

    Raises:
        DataError: the template needs columns other than the prompt.
    """
    template.check(["prompt", "text"])
    written = template.render({"prompt": text, "text": text})
    return _ids(written, tokenizer, Joiner(tokenizer), task, template)[1]


def prompts_of(rows: Rows, layout: Layout, template: Template) -> list[str | None]:
    """Each row's prompt as the template writes it, without the separator; `None` for rows with a problem."""
    out: list[str | None] = []
    for row in range(len(rows)):
        roles = _role_texts(rows, row, layout)
        others = {
            name: rows.text(row, name, may_be_empty=True) for name in dict.fromkeys(template.names) if name not in roles
        }
        values = roles | others
        whole = not any(value is None for value in values.values())
        out.append(template.render(values) if whole else None)
    return out


def completions_of(rows: Rows, layout: Layout, named: Sequence[str] | None) -> list[str | None]:
    """Each row's completion, or its label's name; `None` for rows with a problem."""
    if layout.kind == "classification":
        return label_names(rows, layout.column("label"), named)
    return [rows.text(row, layout.column("completion")) for row in range(len(rows))]


def source_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the encoder of an encoder–decoder reads."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def _role_texts(rows: Rows, row: int, layout: Layout) -> dict[str, str | None]:
    if layout.kind == "completion":
        return {"prompt": rows.text(row, layout.column("prompt"), may_be_empty=True)}
    text = rows.text(row, layout.column("text"), may_be_empty=True)
    if layout.pair is None:
        return {"text": text, "prompt": text}
    pair = rows.text(row, layout.pair, may_be_empty=True)
    both = None if text is None or pair is None else f"{text}\n{pair}"
    return {"text": text, "pair": pair, "prompt": both}


def _ids(
    text: str, tokenizer: PreTrainedTokenizerBase, joiner: Joiner, task: Task, template: Template
) -> tuple[str, list[int]]:
    if task == "seq2seq":
        return text, source_ids(text, tokenizer)
    text += template.separator
    return text, joiner.lead + joiner.plain([text])[0]


def _chat_prompt(
    rows: Rows, row: int, layout: Layout, tokenizer: PreTrainedTokenizerBase, joiner: Joiner
) -> Prompt | None:
    messages = rows.chat(row, layout.column("messages"))
    if messages is None:
        return None
    try:
        before, reference = split_last_turn(messages)
        pieces = [text for text, _ in chat_pieces(before, tokenizer, open_turn=True)]
        tokens = joiner.pieces([pieces])[0]
    except DataError as error:
        rows.found.add(f"{rows.places[row]}: {error}", "Change the chat or the template.")
        return None
    return Prompt("".join(pieces), [token for piece in tokens for token in piece], reference)
