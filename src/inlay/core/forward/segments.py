"""The rows of a mixed batch sorted into segments, one an adapter, so that many adapters are computed at once.

rows       a b a c b a  ──▶  segments  (a a a)(b b ·)(c · ·)      · is an unused slot
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Which row of a batch stands in which slot.

    Attributes:
        owners: the adapter of each segment.
        width: slots per segment.
        slots: the row in each slot; None if they are the batch's rows in order.
        rows: the rows in some slot, and (`back`) the slot of each; None if every slot holds a row of its own.
    """

    owners: tuple[str, ...]
    width: int
    slots: Tensor | None
    rows: Tensor
    back: Tensor | None
    batch: int

    @staticmethod
    def of(names: Sequence[str | None], among: Iterable[str], device: torch.device) -> Segments:
        """Segments for the rows of the adapters in `among`."""
        rows = {name: [r for r, n in enumerate(names) if n == name] for name in among}
        width = _width([len(r) for r in rows.values()])
        owners: list[str] = []
        slots: list[int] = []
        taken: list[int] = []
        back: list[int] = []
        for name, mine in rows.items():
            for start in range(0, len(mine), width):
                part = mine[start : start + width]
                back += range(len(slots), len(slots) + len(part))
                slots += [*part, *[part[-1]] * (width - len(part))]
                taken += part
                owners.append(name)
        whole = slots == list(range(len(names)))
        made = [torch.tensor(v, device=device) for v in (slots, taken, back)]
        return Segments(
            tuple(owners), width, None if whole else made[0], made[1], None if slots == taken else made[2], len(names)
        )

    def take(self, values: Tensor) -> Tensor:
        """The batch's rows, sorted into (segments, tokens, features)."""
        byrow = values.reshape(self.batch, -1, values.shape[-1])
        picked = byrow if self.slots is None else byrow.index_select(0, self.slots)
        return picked.reshape(len(self.owners), -1, values.shape[-1])

    def put(self, into: Tensor, values: Tensor) -> Tensor:
        """Write the rows in `values` back to their places in `into`, and return it."""
        if self.slots is None:
            return values.view(into.shape)
        byrow = values.reshape(len(self.owners) * self.width, -1, values.shape[-1])
        picked = byrow if self.back is None else byrow.index_select(0, self.back)
        into.view(self.batch, -1, into.shape[-1]).index_copy_(0, self.rows, picked)
        return into


def _width(counts: Sequence[int]) -> int:
    """Slots per segment: fewer waste less work on unused slots, more read fewer parameters twice."""
    return min(sorted(set(counts)) or [1], key=lambda w: sum(-(-c // w) for c in counts) * (w + 1))
