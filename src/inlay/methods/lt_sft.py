"""LT-SFT: fine-tune everything, choose the entries that moved most, rewind, and train these alone.

Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", arXiv:2110.07560.

    phase 1    θ' = θ + d                   all entries of d trained, from zero
    between    m = the `share` of all entries with the largest |d|;  d ← 0, optimizer state dropped
    phase 2    θ' = θ + m ⊙ d               what m leaves out stays zero

As in the authors' code, entries are ranked over all chosen parameters, including biases but not norms (its scripts
freeze them); its L1 term is off by default and not offered here. The code gives each phase its own learning-rate
schedule; here the run's one schedule covers both. A head in `modules_to_save` is trained through both phases and not
rewound. Places: all parameters of the numbered layers. Training needs a float32 difference and a mask for all of them,
and the optimizer's moments; from phase 2 on, only the chosen entries are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from inlay.authoring import (
    Adapter,
    Clock,
    DenseDifference,
    Difference,
    Method,
    ModelView,
    Pattern,
    Piece,
    Places,
    Recipe,
    SubsetMethod,
    frozen,
)
from inlay.methods import _sparse
from inlay.methods._entries import SparseDifference, differences, thinned
from inlay.methods._steps import Steps, counted, forget, steps_of


@dataclass(frozen=True, kw_only=True)
class LTSFT(SubsetMethod):
    """Lottery-ticket sparse fine-tuning.

    Attributes:
        share: share of all entries that phase 2 trains.
        first_phase: share of the run's steps in phase 1.
        total_steps: steps of the run; `inlay train` fills it in.
        chosen: parameter → number of its entries; filled in when a finished adapter is written.
    """

    name: ClassVar[str] = "lt-sft"
    paper: ClassVar[str] = "arXiv:2110.07560"
    family: ClassVar[str] = "selective"
    table_order: ClassVar[int] = 50
    recipe: ClassVar[Recipe] = Recipe(learning_rate=5e-4)  # tuned (docs/quality.md); the authors' scripts: 2e-5 to 5e-5
    default_where: ClassVar[str] = _sparse.BLOCKS

    share: float = 0.08  # 14,155,776 of multilingual BERT's 177,853,440, as in the authors' scripts
    first_phase: float = 0.5
    total_steps: int | None = None
    chosen: Mapping[str, int] | Pattern[int] = ()

    def __post_init__(self) -> None:
        within = 0 < self.first_phase < 1
        _sparse.settle(self, (within, f"first_phase is {self.first_phase}, expected between 0 and 1"))

    def switch(self) -> int:
        """The last step of phase 1."""
        return _sparse.end_of_first_phase(self.name, self.first_phase, self.total_steps)

    def choose(self, view: ModelView, places: Places) -> list[str]:
        return _sparse.chosen_in(view, frozen(self.chosen)) or _sparse.candidates(view, places, norms=False)

    def difference(self, name: str, value: Tensor) -> Difference:
        count = dict(frozen(self.chosen)).get(name)
        return MaskedDifference(value) if count is None else SparseDifference(value, count)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        return counted(super().pieces(view, places), self.chosen)

    def clock(self, adapter: Adapter) -> Clock | None:
        return None if self.chosen else Ticket(adapter)

    def ready(self, adapter: Adapter) -> bool:
        done = steps_of(adapter)
        return done is None or (self.total_steps is not None and done >= self.switch())

    def stored(self, adapter: Adapter) -> tuple[Method, dict[str, Tensor]]:
        if self.chosen or not self.ready(adapter):
            return super().stored(adapter)
        kept = {name: part.mask.flatten().nonzero()[:, 0] for name, part in masked(adapter).items()}
        return replace(self, chosen=_sparse.counts(kept)), thinned(adapter, kept)

    @classmethod
    def examples(cls) -> list[LTSFT]:
        return [cls(share=0.1, total_steps=4)]


class MaskedDifference(DenseDifference):
    """A difference at every entry, of which only those in the mask count and get gradients."""

    steps: Steps
    mask: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        self.register_buffer("mask", torch.ones(like.shape, dtype=torch.bool, device=like.device))

    def apply_to(self, value: Tensor) -> Tensor:
        return (value + self.difference * self.mask).to(value.dtype)


def masked(adapter: Adapter) -> dict[str, MaskedDifference]:
    return cast(dict[str, MaskedDifference], differences(adapter))


class Ticket(Clock):
    """Chooses the mask when phase 1 is over."""

    def before_step(self, optimizer: Optimizer) -> None:
        cast(LTSFT, self.adapter.method).switch()  # a run of unknown length is refused at its first step

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        method, parts = cast(LTSFT, self.adapter.method), masked(self.adapter)
        if next(iter(parts.values())).steps.advance() != method.switch():
            return
        moved = {name: part.difference.abs() for name, part in parts.items()}
        kept = _sparse.largest(moved, _sparse.how_many(method.share, moved))
        for name, part in parts.items():
            part.mask.zero_()
            part.mask.view(-1)[kept[name]] = True
            part.difference.zero_()
        forget(optimizer, self.adapter.parameters())
