"""The outputs of a classification or regression head for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.evaluate.batches import by_length, evaluating, pad, padding_id
from inlay.evaluate.progress import Advance


def head_outputs(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    progress: Advance | None = None,
) -> Tensor:
    """The head's logits in the order of the rows, float32 on the CPU, (rows, outputs).

    Args:
        rows: ``input_ids`` and, if the model reads them, ``token_type_ids``.
        progress: called after each batch with the number of its rows.
    """
    filler = padding_id(model, tokenizer)
    found: dict[int, Tensor] = {}
    with evaluating(model) as device:
        for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
            picked = [rows[n] for n in batch]
            inputs = {
                "input_ids": pad([row["input_ids"] for row in picked], filler, "right"),
                "attention_mask": pad([[1] * len(row["input_ids"]) for row in picked], 0, "right"),
            }
            if "token_type_ids" in picked[0]:
                inputs["token_type_ids"] = pad([row["token_type_ids"] for row in picked], 0, "right")
            logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
            found |= dict(zip(batch, logits.float().cpu(), strict=True))
            if progress is not None:
                progress(len(batch))
    return torch.stack([found[n] for n in range(len(rows))])
