"""Cross-entropy of a chunk of logits, overwritten by its gradient; only a few rows at a time are in float32.

    z = cap · tanh(factor · s / cap)        loss = log Σ e^z − z_label        s ← (softmax(z) − onehot) ∘ dz/ds

Half-precision logits of 256 rows and 32,000 words take 16 MiB; a float32 copy takes twice that and does not stay in any
cache between two passes. The few rows that are in float32 here do. Rows are independent, so nothing else changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOGITS_IN_CACHE = 2**18  # float32 numbers at a time: 1 MiB


def cross_entropy_(scores: Tensor, labels: Tensor, factor: float, cap: float | None, *, writes: bool) -> Tensor:
    """The loss of each row, (rows) in float32.

    Args:
        scores: the logits (rows, vocabulary), contiguous; overwritten, with the gradient of the losses if `writes`.
        labels: (rows, 1).
        writes: whether the gradient is needed.
    """
    rows, vocabulary = scores.shape
    few = max(1, LOGITS_IN_CACHE // vocabulary) if scores.device.type in ("cpu", "meta") else rows
    losses = scores.new_empty(rows, dtype=torch.float32)
    narrow = scores.dtype != torch.float32
    wide = scores.new_empty((min(few, rows), vocabulary), dtype=torch.float32) if narrow else None
    for start in range(0, rows, few):
        own, at = scores[start : start + few], slice(start, start + few)
        z = own if wide is None else wide[: own.shape[0]].copy_(own)
        losses[at], gradient = _of_block(z, labels[at], factor, cap)
        if writes and gradient is not own:
            own.copy_(gradient)
        if scores.is_meta:
            break  # the other blocks allocate no more memory
    return losses


def _of_block(z: Tensor, labels: Tensor, factor: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """The losses of some rows with logits z, and their gradient; z is overwritten (by the gradient if no cap)."""
    if factor != 1.0:
        z.mul_(factor)
    bent = None if cap is None else z.div_(cap).tanh_()
    z = z if bent is None or cap is None else bent * cap
    highest, of_label = z.amax(1), z.gather(1, labels).squeeze(1)
    shares = torch.softmax(z, 1, out=z)  # one pass; the normaliser follows from the largest probability
    losses = highest - shares.amax(1).log() - of_label
    shares.scatter_add_(1, labels, shares.new_full(labels.shape, -1.0))
    if bent is not None:
        shares.mul_(1 - bent.square())
    return losses, shares if factor == 1.0 else shares.mul_(factor)
