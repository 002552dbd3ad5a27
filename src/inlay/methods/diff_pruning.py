"""Diff pruning: a difference to every parameter, behind gates that a penalty closes; then the largest entries alone.

Guo et al. 2021, "Parameter-Efficient Transfer Learning with Diff Pruning", arXiv:2012.07463.

    θ' = θ + z ⊙ w              z = min(1, max(0, s (r − l) + l)),  s = σ(log u − log(1 − u) + α),  u ~ U(0, 1)
    gradient of α += λ ∇ Σ σ(α − log(−l / r))                       the expected number of open gates; l, r = ∓1.5
    structured:  z is multiplied by one more gate for each parameter tensor
    at the end of the first phase:  δ = z ⊙ w, drawn once; the `share` of all entries with the largest |δ| is kept
    second phase:  θ' = θ + m ⊙ w, from w = δ, m fixed, the optimizer starting anew

w starts at zero, α at 5. The paper's structured penalty is the product of two probabilities; the official code adds
them. We follow the code, for which the λ were published. In training, gates are drawn each time a parameter is used;
otherwise they have their most likely value. The penalty's gradient is added after gradient clipping, so the loss does
not show it. Gates learn at 10,000 times the rate (the scripts: 0.1 beside 1e-5): train with `Adapter.parameter_groups`.

Places: all parameters of the numbered layers. In training, two float32 numbers for each entry, their gradients and
    moments
are unavoidable; from the second phase on, only the kept entries are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from inlay.authoring import (
    Adapter,
    Clock,
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
from inlay.methods._gates import GatedDifference, closing_slope
from inlay.methods._steps import counted, forget, steps_of


@dataclass(frozen=True, kw_only=True)
class DiffPruning(SubsetMethod):
    """A difference under an L0 penalty.

    Attributes:
        share: share of all entries that is kept.
        structured: whether each parameter tensor also has a gate of its own, as in the paper's better variant.
        penalty: λ.
        gate_start: α at the start.
        gate_rate: the gates' learning rate, as a multiple of the run's.
        first_phase: share of the run's steps before the projection.
        total_steps: steps of the run; `inlay train` fills it in.
        chosen: parameter → number of its entries; filled in when a finished adapter is written.
    """

    name: ClassVar[str] = "diff-pruning"
    paper: ClassVar[str] = "arXiv:2012.07463"
    family: ClassVar[str] = "selective"
    table_order: ClassVar[int] = 60
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-4)  # tuned (docs/quality.md); the authors' scripts: 1e-5
    default_where: ClassVar[str] = _sparse.BLOCKS

    share: float = 0.005
    structured: bool = True
    penalty: float = 1.25e-7
    gate_start: float = 5.0
    gate_rate: float = 1e4
    first_phase: float = 0.5
    total_steps: int | None = None
    chosen: Mapping[str, int] | Pattern[int] = ()

    def __post_init__(self) -> None:
        within = 0 < self.first_phase < 1
        _sparse.settle(self, (within, f"first_phase is {self.first_phase}, expected between 0 and 1"))

    def switch(self) -> int:
        return _sparse.end_of_first_phase(self.name, self.first_phase, self.total_steps)

    def rate_of(self, name: str) -> float:
        return self.gate_rate if name.endswith(("/gates", "/group")) else 1.0

    def choose(self, view: ModelView, places: Places) -> list[str]:
        return _sparse.chosen_in(view, frozen(self.chosen)) or _sparse.candidates(view, places)

    def difference(self, name: str, value: Tensor) -> Difference:
        count = dict(frozen(self.chosen)).get(name)
        return (
            GatedDifference(value, self.gate_start, self.structured)
            if count is None
            else SparseDifference(value, count)
        )

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        return counted(super().pieces(view, places), self.chosen)

    def clock(self, adapter: Adapter) -> Clock | None:
        return None if self.chosen else Projection(adapter)

    def ready(self, adapter: Adapter) -> bool:
        done = steps_of(adapter)
        return done is None or (self.total_steps is not None and done >= self.switch())

    def stored(self, adapter: Adapter) -> tuple[Method, dict[str, Tensor]]:
        if self.chosen or not self.ready(adapter):
            return super().stored(adapter)
        kept = {name: (part.gates > 0).flatten().nonzero()[:, 0] for name, part in gated(adapter)}
        return replace(self, chosen=_sparse.counts(kept)), thinned(adapter, kept)

    @classmethod
    def examples(cls) -> list[DiffPruning]:
        return [cls(share=0.1, total_steps=4), cls(share=0.1, total_steps=4, structured=False, gate_start=1.0)]


def gated(adapter: Adapter) -> list[tuple[str, GatedDifference]]:
    return cast(list[tuple[str, GatedDifference]], list(differences(adapter).items()))


class Projection(Clock):
    """Adds the penalty's gradient, and projects when the first phase is over."""

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        method, parts = cast(DiffPruning, self.adapter.method), gated(self.adapter)
        searching = int(parts[0][1].steps.done) < method.switch()
        for alpha in (a for _, part in parts for a in part.alphas()):
            slope = method.penalty * closing_slope(alpha)
            alpha.grad = None if not searching else slope if alpha.grad is None else alpha.grad.add_(slope)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        method, parts = cast(DiffPruning, self.adapter.method), gated(self.adapter)
        if parts[0][1].steps.advance() != method.switch():
            return
        drawn = {name: part.gated(True) for name, part in parts}
        sizes = {name: delta.abs() for name, delta in drawn.items()}
        kept = _sparse.largest(sizes, _sparse.how_many(method.share, sizes))
        for name, part in parts:
            part.gates.fill_(-math.inf).view(-1)[kept[name]] = math.inf
            part.difference.copy_(drawn[name] * (part.gates > 0))
            if part.group is not None:
                part.group.fill_(math.inf)
        forget(optimizer, self.adapter.parameters())
