"""Rows into rectangles: batches of similar length, padded on a stated side, and a model in eval mode.

Padding is done here and not by the tokenizer, so that no tokenizer setting is changed or relied upon.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.core.errors import ConfigError


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices in batches, longest first, so that a batch too big for the memory fails at once.

    Raises:
        ConfigError: a batch size below one.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}; expected 1 or more")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    """The rows as one (rows, longest) tensor of int64, filled up with `value` on `side`."""
    longest = max(len(row) for row in rows)
    padded = torch.full((len(rows), longest), value, dtype=torch.long)
    for place, row in enumerate(rows):
        at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        padded[place, at] = torch.tensor(row, dtype=torch.long)
    return padded


def padding_id(model: Any, tokenizer: Any) -> int:
    """A token to fill up with. It is masked, but heads that look for the last real token know it."""
    found = (model.config.get_text_config().pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in found if token is not None), 0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Every submodule in eval mode and no gradients inside, each one's own mode back afterwards.

    Yields:
        The device that inputs belong on.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        # `train(True)` would recurse and wake modules that the user had put to eval mode.
        for module in training:
            module.training = True
