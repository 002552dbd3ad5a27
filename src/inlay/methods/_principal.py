"""Principal components of a stream of batches, which are not kept.

Ross et al. 2008, "Incremental Learning for Robust Visual Tracking": the components so far, scaled by their singular
values, represent all earlier rows, and one more row represents the shift of the mean.

    [ S V ; X − mean(X) ; √(n m / (n + m)) (mean − mean(X)) ]  =  U S' V'        n rows so far, m new ones
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EXACT = 4  # times the components: a matrix of at most this size is decomposed exactly
POWER_ITERATIONS = 4


class Principal:
    """The first principal components of all rows added so far.

    Attributes:
        components: (found, features), orthonormal rows, each with its largest entry positive.
        singular: (found), of the centred rows.
        spread: sum of squares of the centred rows, over all features.
        likeness: (found), |cosine| between each component and itself before the last batch; None after the first.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self.mean, self.components, self.singular, self.spread = (torch.zeros(0) for _ in range(4))
        self.likeness: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add more rows, (rows, features)."""
        rows = rows.float()
        if not len(rows):
            return
        mean = rows.mean(0)
        stacked = [rows - mean]
        total = self.count + len(rows)
        if self.count:
            shift = (self.count * len(rows) / total) ** 0.5 * (self.mean - mean)
            stacked += [shift[None], self.singular[:, None] * self.components]
        before = self.components
        added = torch.cat(stacked[:2]).square().sum()
        self.spread = self.spread + added if self.count else added
        self.mean = mean + (self.mean - mean) * (self.count / total) if self.count else mean
        self.singular, self.components = _decompose(torch.cat(stacked), self.most)
        if self.count:
            shared = min(len(before), len(self.components))
            self.likeness = (before[:shared] * self.components[:shared]).sum(1).abs()
        self.count = total

    def explained(self) -> Tensor:
        """(found): each component's share of the rows' variance; 0 where it is rounding only."""
        share = self.singular.square() / self.spread.clamp(min=torch.finfo(torch.float32).tiny)
        return share * (share > 1e-10) if self.count else self.singular

    def settled(self, rank: int, least: float) -> bool:
        """Whether the last batch hardly turned the first `rank` components."""
        if self.likeness is None or len(self.likeness) < rank:
            return False
        return bool((self.likeness[:rank] >= least).all())

    def directions(self, rank: int, *, whiten: bool) -> Tensor:
        """(rank, features): the first components, each divided by the root of its singular value if `whiten`."""
        chosen = self.components[:rank]
        return chosen / self.singular[:rank, None].sqrt() if whiten else chosen


class Inputs:
    """Principal components of the inputs of several modules; modules with the same input share theirs."""

    def __init__(self, most: Sequence[int]) -> None:
        self.parts = [Principal(n) for n in most]
        self.owners: dict[int, int] = {}
        self.last: tuple[Tensor, int] | None = None
        self.open = [True] * len(most)

    def see(self, index: int, x: Tensor, rows: Tensor) -> None:
        """Add `rows`, taken from the input `x` of module `index`."""
        if index not in self.owners:
            # The tensor seen last is held, so that no other tensor can take its address.
            again = self.last is not None and _same(self.last[0], x)
            self.owners[index] = self.last[1] if self.last is not None and again else index
            self.last = (x, self.owners[index])
        if self.owners[index] == index and self.open[index]:
            self.parts[index].add(rows)

    def keep(self, parts: Sequence[Principal]) -> None:
        """From now on consider only the inputs of `parts`."""
        self.open = [any(part is p for p in parts) for part in self.parts]

    @property
    def done(self) -> bool:
        """Whether none of the inputs seen so far is considered any longer."""
        return not any(self.open[i] for i in set(self.owners.values()))

    def of(self, index: int) -> Principal:
        return self.parts[self.owners.get(index, index)]


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride(), one._version) == (
        other.data_ptr(), other.shape, other.stride(), other._version,
    )  # fmt: skip


def _decompose(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first singular values and right singular vectors (as rows); randomised where that pays."""
    if min(matrix.shape) <= EXACT * most:
        _, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _, singular, v = torch.svd_lowrank(matrix, q=2 * most, niter=POWER_ITERATIONS)
        vh = v.t()
    singular, vh = singular[:most], vh[:most]
    largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
    return singular, vh * torch.where(largest < 0, -1.0, 1.0)
