"""One tiny random model and how to feed it; the zoo in `models.py` is a mapping of these.

*Every* parameter is random, biases and norms too: a fresh model's zero biases and unit norms hide
bugs (a bias that is dropped, or scaled twice, changes nothing). Scales are kept so that logits are of
order one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.testing.mould import Mould

Kind = Literal["decoder", "encoder", "seq2seq", "vision", "plain"]
Task = Literal["causal", "classification", "seq2seq", "features"]
Side = Literal["left", "right"]

VOCABULARY = 97
PAD, BOS, EOS = 0, 1, 2
TOKENS = 12
CLASSES = 5
IMAGE = 16  # pixels a side

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One tiny model and how to feed it.

    Attributes:
        name: key in the zoo; appears in test ids.
        kind: what sort of model it is.
        task: what its labels mean; ``features`` has none.
        factory: makes the model; called once, under a fixed seed.
        supports_generate: `model.generate` works.
        attention_interface: its attention passes through transformers' attention interface.
        takes_positions: its forward takes ``position_ids``.
        padding_sides: sides on which a padded row gives the same logits as the row alone.
        shares_projections: its query and key layers also see positions that all rows share, so that they
            cannot serve several adapters in one batch.
        tokens: length of the longest row of a batch (of pixels or features, not used).
    """

    name: str
    kind: Kind
    task: Task
    factory: Callable[[], nn.Module]
    supports_generate: bool = False
    attention_interface: bool = True
    takes_positions: bool = False
    padding_sides: tuple[Side, ...] = ("right",)
    tokens: int = TOKENS
    shares_projections: bool = False

    def build(self, *, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh copy of the model, in eval mode, every parameter random.

        Args:
            dtype: dtype of the parameters; buffers keep theirs, as in `from_pretrained`.
        """
        model = _mould(self).cast()
        if dtype is not torch.float32:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            if hasattr(model, "config"):
                model.config.dtype = dtype
        return model

    def batch(self, rows: int, seed: int, ragged: bool = False, padding_side: Side = "right") -> dict[str, Tensor]:
        """Random inputs for the model's forward, with labels where the model has a loss.

        Args:
            rows: number of rows.
            seed: the same seed gives the same batch; row ``i`` does not depend on ``rows``.
            ragged: rows of different lengths, padded; the first row keeps the full length.
            padding_side: where the padding goes. Padding on the left brings ``position_ids`` with it
                for the models that take them. Targets of a seq2seq model are padded on the right.

        Returns:
            Keyword arguments: ``input_ids`` and ``attention_mask`` of shape ``(rows, tokens)``, or
            ``pixel_values`` ``(rows, 3, 16, 16)``, or ``input`` for a plain module.

        Raises:
            ValueError: ragged rows for a model without padding.
        """
        if self.kind in ("vision", "plain"):
            return self._images(rows, seed, ragged)
        lengths = [self._length(seed, row) if ragged else self.tokens for row in range(rows)]
        batch = _padded(self._drawn(seed, 0, lengths), self.tokens, padding_side)
        if self.takes_positions and ragged and padding_side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch["labels"] = self._labels(batch, lengths, seed)
        return batch

    def prompts(self, rows: int, seed: int, ragged: bool = False) -> dict[str, Tensor]:
        """Inputs for `model.generate`: no labels, and decoders are padded on the left.

        Raises:
            ValueError: the model does not generate.
        """
        if not self.supports_generate:
            raise ValueError(f"specimen {self.name!r} does not generate")
        batch = self.batch(rows, seed, ragged, "left" if self.kind == "decoder" else "right")
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    def row(self, batch: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """One row of a batch, alone and without its padding on the input side."""
        alone = {key: value[index : index + 1] for key, value in batch.items()}
        if "attention_mask" not in alone:
            return alone
        kept = alone["attention_mask"][0].bool()
        width = kept.numel()
        same_length: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids")
        if self.task == "causal":
            same_length += ("labels",)
        return {
            key: value[:, kept] if key in same_length and value.shape[1] == width else value
            for key, value in alone.items()
        }

    def logits(self, output: Any) -> Tensor:
        """The output to compare: `(rows, tokens, vocabulary)` or `(rows, classes)`."""
        result: Tensor = output if isinstance(output, Tensor) else output.logits
        return result

    def _length(self, seed: int, row: int) -> int:
        # The first row is full; the others are shorter by different amounts, none below a third.
        return self.tokens - (0 if row == 0 else 1 + (5 * row + seed) % (2 * self.tokens // 3))

    def _drawn(self, seed: int, stream: int, lengths: list[int]) -> list[Tensor]:
        return [
            torch.randint(EOS + 1, VOCABULARY, (length,), generator=_generator(self.name, seed, stream, row))
            for row, length in enumerate(lengths)
        ]

    def _labels(self, batch: Mapping[str, Tensor], lengths: list[int], seed: int) -> Tensor:
        if self.task == "classification":
            return torch.tensor([(seed + 2 * row) % CLASSES for row in range(len(lengths))])  # (rows,)
        if self.task == "causal":
            return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        targets = [max(3, length - 4) for length in lengths]
        padded = _padded(self._drawn(seed, 1, targets), max(targets), "right")
        return padded["input_ids"].masked_fill(padded["attention_mask"] == 0, IGNORED_LABEL)

    def _images(self, rows: int, seed: int, ragged: bool) -> dict[str, Tensor]:
        if ragged:
            raise ValueError(f"specimen {self.name!r} has no padding, so no ragged rows")
        images = torch.stack(
            [torch.randn(3, IMAGE, IMAGE, generator=_generator(self.name, seed, 0, row)) for row in range(rows)]
        )  # (rows, 3, height, width)
        if self.kind == "plain":
            return {"input": images}
        return {"pixel_values": images, "labels": self._labels({}, [0] * rows, seed)}


def _padded(rows: list[Tensor], width: int, side: Side) -> dict[str, Tensor]:
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else width - row.numel()
        ids[index, start : start + row.numel()] = row
        mask[index, start : start + row.numel()] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _generator(*key: object) -> torch.Generator:
    # crc32 and not hash(): string hashes differ from process to process.
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


@cache
def _mould(specimen: Specimen) -> Mould:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = specimen.factory()
    randomise(model, specimen.name)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Without an end token every row generates as long as asked, so that lengths can be compared.
        generation.eos_token_id = None
        generation.pad_token_id = PAD
    return Mould(model.eval())


def randomise(model: nn.Module, seed: object) -> None:
    """Give every parameter random values, in place, so that no zero or one hides a bug.

    Vectors (biases, norms) are moved away from their initial values; matrices are drawn anew with unit gain,
    embeddings and other tables with a standard deviation of 0.3.
    """
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=_generator(seed, name))
        if parameter.dim() < 2:
            parameter.data.add_(noise, alpha=0.2)
        else:
            parameter.data.copy_(noise * _scale(owners[id(parameter)], parameter))


def _scale(owner: nn.Module, parameter: Tensor) -> float:
    kind = type(owner).__name__
    if kind == "Conv1D":  # GPT-2 keeps (in, out)
        return 1 / math.sqrt(parameter.shape[0])
    if isinstance(owner, nn.Embedding) or "Embedding" in kind:
        # Conv2d patch embeddings own their kernel themselves, so only tables and class tokens come here.
        return 0.3
    if isinstance(owner, nn.Conv2d):
        return 1 / math.sqrt(parameter[0].numel())
    return 1 / math.sqrt(parameter.shape[-1])
