"""The order of the rows: random, with rows of similar length together, and determined by seed and epoch alone.

Because it depends on nothing else, a run can be resumed at any step. Similar lengths need less padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

WINDOW = 32  # batches within which rows are sorted; more would mix less, 8 pads a tenth more on short questions


class LengthGroupedOrder(Sampler[int]):
    """Row numbers for one epoch after another.

    Args:
        lengths: number of tokens of each row.
        batch_size: rows in a batch.
        seed: seed of the run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * WINDOW
        batches: list[list[int]] = []
        for start in range(0, len(rows), size):
            window = sorted(rows[start : start + size], key=lambda row: self.lengths[row])
            batches += [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
        # A batch with fewer rows stays last: anywhere else it would shift the borders of the others.
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        short = [batch for batch in batches if len(batch) < self.batch_size]
        for place in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[place]
        for batch in short:
            yield from batch
