"""The checked options of one `encode` call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from inlay.core.errors import ConfigError, nearest, problems
from inlay.core.labels import IGNORED
from inlay.data.columns import TASKS_OF, Layout, Task
from inlay.data.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnLong = Literal["error", "truncate", "drop", "split"]
ON_LONG: tuple[OnLong, ...] = ("error", "truncate", "drop", "split")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The options of `encode`, and what the data set says about its labels.

    Attributes:
        label_names: the label vocabulary; a class is the index of its label.
        named: the names of a `ClassLabel` column.

    Raises:
        ConfigError: options that are unknown or do not fit the data or the tokenizer.
    """

    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    task: Task
    max_length: int
    template: Template
    on_long: OnLong
    label_names: Sequence[str] = ()
    named: Sequence[str] | None = None

    def __post_init__(self) -> None:
        found, kind = [], self.layout.kind
        if self.task not in TASKS_OF[kind]:
            found.append(f"{kind} data is for {' or '.join(TASKS_OF[kind])}, not for the task {self.task!r}")
        if self.on_long not in ON_LONG:
            found.append(f"on_long={self.on_long!r} is unknown{nearest(self.on_long, ON_LONG)}")
        if self.on_long == "split" and kind != "text":
            found.append(f"on_long='split' is for plain text, not for {kind} data; use truncate or drop")
        if self.max_length < 2:
            found.append(f"max_length={self.max_length} leaves no room for a token and one scored after it")
        if self.task == "causal" and kind != "chat" and self.template.end and self.tokenizer.eos_token_id is None:
            found.append(
                "the tokenizer has no end token, so the model cannot learn where to stop; "
                "set tokenizer.eos_token, or use a template with end=False"
            )
        if found:
            raise ConfigError(problems("encoding", found))

    @property
    def end(self) -> list[int]:
        """The end token that follows a completion or a text in a decoder."""
        return [int(self.tokenizer.eos_token_id)] if self.template.end else []


@dataclass(frozen=True)
class Encoded:
    """One row, ready for the model.

    Attributes:
        input_ids: the tokens.
        labels: one for each of `input_ids` (causal), the target (seq2seq), a class or a number.
        length: number of tokens before the row was shortened.
        segments: 0 for the first text, 1 for the second (``token_type_ids``), if the base reads them.
    """

    input_ids: list[int]
    labels: list[int] | int | float
    length: int
    segments: list[int] | None = None

    @property
    def scored(self) -> bool:
        """Whether anything is scored."""
        return not isinstance(self.labels, list) or any(label != IGNORED for label in self.labels)
