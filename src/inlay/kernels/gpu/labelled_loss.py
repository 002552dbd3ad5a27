"""Cross-entropy of a chunk of logits, overwritten by its gradient: two passes over a row, nothing else in memory.

    z = cap · tanh(factor · s / cap)        loss = log Σ e^z − z_label        s ← (softmax(z) − onehot) ∘ dz/ds

Numbers are float32 inside of the kernel, and in the logits' dtype in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits at a time


@triton.jit
def _shaped(score, factor, cap, CAPPED: tl.constexpr):
    z = score.to(tl.float32) * factor
    if CAPPED:
        z = cap * (2 * tl.sigmoid(2 * z / cap) - 1)  # tanh
    return z


@triton.jit
def _cross_entropy(
    scores, labels, losses, vocabulary, factor, cap, CAPPED: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    scores += row.to(tl.int64) * vocabulary
    label = tl.load(labels + row)
    of_label = _shaped(tl.load(scores + label), factor, cap, CAPPED)
    highest, total = -float("inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = _shaped(tl.load(scores + at, mask=at < vocabulary, other=0.0), factor, cap, CAPPED)
        z = tl.where(at < vocabulary, z, -float("inf"))
        new = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(z - new), 0)
        highest = new
    tl.store(losses + row, highest + tl.log(total) - of_label)
    if WRITES:
        tl.debug_barrier()  # by now the label's logit has been read
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = _shaped(tl.load(scores + at, mask=at < vocabulary, other=0.0), factor, cap, CAPPED)
            change = tl.exp(z - highest) / total - tl.where(at == label, 1.0, 0.0)
            if CAPPED:
                change *= 1 - (z / cap) * (z / cap)
            tl.store(scores + at, (change * factor).to(scores.dtype.element_ty), mask=at < vocabulary)


def cross_entropy_(scores: Tensor, labels: Tensor, factor: float, cap: float | None, *, writes: bool) -> Tensor:
    """The loss of each row, (rows) in float32.

    Args:
        scores: the logits (rows, vocabulary), contiguous; overwritten with the gradient of the losses if `writes`.
        labels: (rows).
        writes: whether the gradient is needed.
    """
    losses = scores.new_empty(scores.shape[0], dtype=torch.float32)
    size = min(BLOCK, triton.next_power_of_2(scores.shape[1]))
    with torch.cuda.device_of(scores):
        _cross_entropy[(scores.shape[0],)](
            scores, labels.contiguous(), losses, scores.shape[1], float(factor), float(cap or 1.0), cap is not None,
            writes, size,
        )  # fmt: skip
    return losses
