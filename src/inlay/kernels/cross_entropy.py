"""Cross-entropy of a chunk of scores, whose place its gradient takes; float32 numbers only of a few rows at a time.

    z = cap · tanh(factor · s / cap)        loss = log Σ e^z − z_label        s ← (softmax(z) − onehot) ∘ dz/ds

Half-precision scores of 256 rows and 32,000 words are 16 MiB, their float32 copy is twice that and falls out of every
cache between two passes; the few rows that are in float32 here stay in it. Rows do not meet, so nothing else changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES_IN_CACHE = 2**18  # float32 numbers at a time: 1 MiB


def cross_entropy_(scores: Tensor, labels: Tensor, factor: float, cap: float | None, *, writes: bool) -> Tensor:
    """The loss of each row, (rows) in float32.

    Args:
        scores: (rows, vocabulary), contiguous; the losses' gradient with respect to them afterwards, or anything.
        labels: (rows, 1).
        writes: whether that gradient is wanted.
    """
    rows, vocabulary = scores.shape
    few = max(1, SCORES_IN_CACHE // vocabulary) if scores.device.type in ("cpu", "meta") else rows
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
            break  # the other blocks allocate nothing more
    return losses


def _of_block(z: Tensor, labels: Tensor, factor: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """The losses of some rows whose scores are in z, which is written, and their gradient, in z if there is no cap."""
    if factor != 1.0:
        z.mul_(factor)
    bent = None if cap is None else z.div_(cap).tanh_()
    z = z if bent is None or cap is None else bent * cap
    highest, of_label = z.amax(1), z.gather(1, labels).squeeze(1)
    shares = torch.softmax(z, 1, out=z)  # one pass; the normaliser is what made the highest its share
    losses = highest - shares.amax(1).log() - of_label
    shares.scatter_add_(1, labels, shares.new_full(labels.shape, -1.0))
    if bent is not None:
        shares.mul_(1 - bent.square())
    return losses, shares if factor == 1.0 else shares.mul_(factor)
