"""From rows to batches: sorted by length, padded on a given side; and a model in eval mode.

Padding is done here, not by the tokenizer, so that its settings are neither changed nor needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.core.errors import ConfigError


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices in batches, longest first, so that a batch that does not fit into memory fails at once.

    Raises:
        ConfigError: the batch size is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}; expected 1 or more")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    """The rows as one int64 tensor (rows, longest), padded with `value` on `side`."""
    longest = max(len(row) for row in rows)
    padded = torch.full((len(rows), longest), value, dtype=torch.long)
    for place, row in enumerate(rows):
        at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        padded[place, at] = torch.tensor(row, dtype=torch.long)
    return padded


def padding_id(model: Any, tokenizer: Any) -> int:
    """The token to pad with. It is masked, but some heads use it to find the last real token."""
    found = (model.config.get_text_config().pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in found if token is not None), 0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """For a block: every submodule in eval mode, no gradients; afterwards each submodule's own mode is restored.

    Yields:
        The device on which inputs must be.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        # `train(True)` would recurse into modules that the user had set to eval mode.
        for module in training:
            module.training = True
