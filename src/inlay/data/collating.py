"""From rows to padded tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from inlay.core.errors import ConfigError
from inlay.core.labels import IGNORED
from inlay.data.columns import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads the rows of a batch to the longest one; padding is masked and never scored.

    Attributes:
        task: determines what the labels are.
        pad_id: the padding token.
        side: the side on which rows are padded. Targets of encoder–decoders are always padded on the right.
        multiple_of: lengths are rounded up to a multiple of this (8 suits tensor cores).
    """

    task: Task
    pad_id: int
    side: Literal["left", "right"]
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of encoded rows; columns that no model reads are left out.

        Returns:
            ``input_ids``, ``attention_mask`` (and ``token_type_ids`` if given) of shape (batch, tokens);
            ``labels`` of shape (batch, tokens), of (batch, target tokens) in seq2seq, else (batch,).
        """
        batch = {
            "input_ids": self._padded([row["input_ids"] for row in rows], self.pad_id, self.side),
            "attention_mask": self._padded([row["attention_mask"] for row in rows], 0, self.side),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._padded([row["token_type_ids"] for row in rows], 0, self.side)
        if "labels" in rows[0]:
            batch["labels"] = self._labels([row["labels"] for row in rows])
        return batch

    def _labels(self, labels: Sequence[Any]) -> torch.Tensor:
        match self.task:
            case "classification":
                return torch.tensor(labels, dtype=torch.long)
            case "regression":
                return torch.tensor(labels, dtype=torch.float32)
            case "seq2seq":
                return self._padded(labels, IGNORED, "right")
        return self._padded(labels, IGNORED, self.side)

    def _padded(self, lists: Sequence[Sequence[int]], fill: int, side: str) -> torch.Tensor:
        longest = max(len(ids) for ids in lists)
        longest += -longest % self.multiple_of
        padded = torch.full((len(lists), longest), fill, dtype=torch.long)  # (batch, tokens)
        for place, ids in enumerate(lists):
            start = longest - len(ids) if side == "left" else 0
            padded[place, start : start + len(ids)] = torch.as_tensor(ids, dtype=torch.long)
        return padded


def collate(tokenizer: PreTrainedTokenizerBase, task: Task, *, multiple_of: int = 1) -> Collator:
    """The collator for a tokenizer and a task; it pads on the tokenizer's side.

    Raises:
        ConfigError: the tokenizer has no padding token, and the model needs one (a classifier finds the last token
            by it). Other models are padded with the end token, because padding is masked.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is unknown; known: {', '.join(TASKS)}")
    pad = tokenizer.pad_token_id
    if pad is None and task in ("classification", "regression"):
        raise ConfigError(
            "the tokenizer has no padding token, which a classifier needs to find a text's end. "
            "Set tokenizer.pad_token and model.config.pad_token_id"
        )
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    side: Literal["left", "right"] = "left" if tokenizer.padding_side == "left" else "right"
    return Collator(task=task, pad_id=int(pad), side=side, multiple_of=multiple_of)
