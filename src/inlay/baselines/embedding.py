"""One vector for each text, from a base's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.core.errors import ConfigError
from inlay.evaluate.batches import by_length, evaluating, pad, padding_id

Pooling = Literal["cls", "mean", "last"]


def trunk(model: Any) -> Any:
    """The part that computes hidden states: the encoder of an encoder–decoder, else the model without its head."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def embed(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    pooling: Pooling,
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The last hidden states, pooled: (rows, width), float32 on the CPU, in the order of the rows.

    Args:
        rows: ``input_ids`` and, if the base reads them, ``token_type_ids``.
        pooling: the state of the tokenizer's CLS token (``cls``), of the last token (``last``), or the mean over all
            tokens of the text (``mean``).

    Raises:
        ConfigError: ``cls`` for a base whose tokenizer has no CLS token.
    """
    if pooling == "cls" and tokenizer.cls_token_id is None:
        raise ConfigError("pooling=cls, but the base's tokenizer has no CLS token; give pooling=mean or pooling=last")
    filler, body = padding_id(model, tokenizer), trunk(model)
    found: dict[int, Tensor] = {}
    with evaluating(model) as device:
        for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
            picked = [rows[n] for n in batch]
            mask = pad([[1] * len(row["input_ids"]) for row in picked], 0, "right").to(device)
            inputs = {"input_ids": pad([row["input_ids"] for row in picked], filler, "right").to(device)}
            if "token_type_ids" in picked[0]:
                inputs["token_type_ids"] = pad([row["token_type_ids"] for row in picked], 0, "right").to(device)
            states = body(**inputs, attention_mask=mask).last_hidden_state.float()  # (batch, tokens, width)
            found |= dict(zip(batch, _pool(states, mask, pooling).cpu(), strict=True))
            if progress is not None:
                progress(len(batch))
    return torch.stack([found[n] for n in range(len(rows))])


def _pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    match pooling:
        case "cls":
            return states[:, 0]
        case "last":
            return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    weights = mask[:, :, None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)
