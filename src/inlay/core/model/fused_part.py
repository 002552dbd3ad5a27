"""A part of a fused layer's outputs: the query, key or value rows of one matrix.

GPT-2 computes query, key and value with one matrix. A paper that adapts "the value projection" means a
third of its outputs, so a site may be a part of a layer: what a delta sees and changes is only that part.

    contiguous   (q | k | v)                      GPT-2, Phi-3, Falcon's new decoder
    interleaved  (q₁ k₁ v₁ | q₂ k₂ v₂ | …)        GPT-NeoX, BLOOM: one head after another
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Rows ``start:stop`` of each of `groups` equal blocks of the output features.

    Attributes:
        name: ``query``, ``key`` or ``value``; part of the stored key.
    """

    name: str
    groups: int
    start: int
    stop: int

    @property
    def features(self) -> int:
        return self.groups * (self.stop - self.start)

    def take(self, y: Tensor, dim: int = -1) -> Tensor:
        """The part's entries of `y` along `dim`, as one contiguous stretch of size `features`."""
        if self.groups == 1:
            return y.narrow(dim, self.start, self.stop - self.start)
        blocks: Tensor = y.unflatten(dim, (self.groups, -1))
        return blocks.narrow(_inner(dim), self.start, self.stop - self.start).flatten(*_pair(dim))

    def put(self, y: Tensor, part: Tensor, dim: int = -1) -> Tensor:
        """`y` with its part replaced; differentiable in both."""
        blocks = y.unflatten(dim, (self.groups, -1))
        inner = _inner(dim)
        size = blocks.shape[inner]
        new = part.unflatten(dim, (self.groups, -1))
        before = blocks.narrow(inner, 0, self.start)
        after = blocks.narrow(inner, self.stop, size - self.stop)
        return torch.cat([before, new, after], dim=inner).flatten(*_pair(dim))


def _inner(dim: int) -> int:
    """Where the block-inner dimension lies after `unflatten(dim, (groups, -1))`."""
    return dim if dim < 0 else dim + 1


def _pair(dim: int) -> tuple[int, int]:
    return (dim - 1, dim) if dim < 0 else (dim, dim + 1)
