"""Packing several rows into one sequence instead of padding them, if that gives the same results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.pieces import DeltaPiece, PromptPiece
from inlay.core.errors import UnsupportedError
from inlay.core.forward.wrappers import enabled, switched_off
from inlay.core.labels import IGNORED
from inlay.kernels import packed, trunk
from inlay.train.config import RunConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from inlay.data.collating import Collator

LENGTHS = (17, 24, 11)  # lengths of the texts on which a model is tried
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative, for the logits of one token


@dataclass(frozen=True)
class PackingCollator:
    """Packs rows of different lengths; rows of equal length need no padding and stay a batch."""

    padded: Collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """As in `Collator`; packed tensors are (1, tokens), with ``position_ids`` that restart at each row."""
        texts = [list(row["input_ids"]) for row in rows]
        if len({len(text) for text in texts}) == 1:
            return self.padded(rows)
        batch = packed.pack(texts)
        if "labels" in rows[0]:  # a row's first token would be predicted from the row before
            batch["labels"] = torch.tensor([[t for row in rows for t in (IGNORED, *row["labels"][1:])]])
        return batch


def packs(config: RunConfig, task: str, model: Any, adapter: Adapter, rows: Dataset) -> bool:
    """Whether a run packs its rows; if so, the model is prepared for it.

    Raises:
        UnsupportedError: packing was asked for, but is not exact here.
    """
    if config.packing is False or config.compile:  # a graph does not know where rows begin
        return False
    if not enabled("packing"):
        return switched_off("packing", asked=bool(config.packing))
    try:
        _prepare(config, task, model, adapter, rows)
    except UnsupportedError as error:
        if config.packing is None:
            return False
        raise UnsupportedError(f"--packing is not exact here: {error}. Leave it out") from error
    return True


def _prepare(config: RunConfig, task: str, model: Any, adapter: Adapter, rows: Dataset) -> None:
    if task != "causal":
        raise UnsupportedError(f"only rows of the task causal can be packed, not of {task}")
    for piece in adapter.pieces:
        if isinstance(piece, PromptPiece) or (isinstance(piece, DeltaPiece) and piece.delta.reads_span):
            raise UnsupportedError(f"method {adapter.method.name!r} depends on where a row begins")
    if config.gradient_checkpointing and next(model.parameters()).is_cuda:
        raise UnsupportedError(
            "a GPU recomputes checkpointed layers in another thread, which does not know where rows begin"
        )
    texts = _texts(rows)
    undo = packed.prepare(model)
    with trunk.quietly(model), _moved(adapter):
        exact = packed.isolates(model, texts, TOLERANCE.get(model.dtype, 1e-3))
    if not exact:
        undo()
        raise UnsupportedError(f"{type(model).__name__} gives packed rows other logits than the same rows alone")


def _texts(rows: Dataset) -> list[list[int]]:
    """Pieces of the run's own rows, of different lengths."""
    tokens = [token for row in rows.select(range(min(len(rows), 64)))["input_ids"] for token in row]
    if len(tokens) < sum(LENGTHS):
        raise UnsupportedError(f"{len(tokens)} tokens are too few to try it")
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [tokens[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


@contextmanager
def _moved(adapter: Adapter) -> Iterator[None]:
    """For a block, move an adapter away from its start, where it often does nothing."""
    kept = [(p, p.detach().clone()) for p in adapter.parameters()]
    try:
        for parameter, _ in kept:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        yield
    finally:
        for parameter, value in kept:
            parameter.copy_(value)
