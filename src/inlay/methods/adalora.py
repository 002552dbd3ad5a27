"""AdaLoRA: singular triplets whose number shrinks during training, by importance over all matrices together.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.

    y = W x + s P (λ ⊙ Q x)      s = alpha / initial rank; Q, here a: (rank, in); λ, e: (rank); P, b: (out, rank)
    gradient += γ · mean over all P and Q of ∇‖PᵀP − I‖_F, ∇‖QQᵀ − I‖_F
    I = |w · ∇w|,  Ī ← β₁ Ī + (1 − β₁) I,  Ū ← β₂ Ū + (1 − β₂) |I − Ī|,  s(w) = Ī Ū           while t < T − t_f
    the optimizer's step t
    keep the b(t) triplets of the highest S = s(λ) + mean s(P) + mean s(Q), set the other λ to zero     every Δ steps

Initialisation: λ zero, P and Q N(0, 0.02). b(t) falls from rank to target_rank a matrix with the cube of
1 − (t − t_i) / (T − t_i − t_f); from t = T − t_f on the same triplets are kept. Pruned ones stay trainable until then.
Paper and official code differ: the budget is the code's (equation 14 would start above the initial one); the
regulariser is the code's mean of norms, not the paper's sum of squares, as the published γ belong to it; scores pair
a step's weights with its gradients, as in the paper (the code takes the weights after the step). The regulariser's
gradient is added after gradient clipping, so it is not part of the reported loss. Where left open, t_i, t_f and Δ are a
tenth, half and a thousandth of T, as in the paper's tables. Places: all matrices of attention and feed-forward. A
finished adapter is written without pruned triplets and averages; `rank_pattern` says what is left.
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
    Delta,
    DeltaMethod,
    Method,
    ModelView,
    Pattern,
    Piece,
    Places,
    Recipe,
    Site,
    frozen,
    value_at,
)
from inlay.methods._steps import counted, length_of_run, steps_of
from inlay.methods._triplets import Triplets, without_pruned


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(DeltaMethod):
    """Triplets under a budget.

    Attributes:
        rank, target_rank: rank of every matrix at first, and mean rank at the end.
        alpha, dropout: as in LoRA.
        warmup_steps, final_steps, interval: t_i, t_f and Δ.
        beta1, beta2, orthogonality: β₁ and β₂ of the averages; γ.
        total_steps: T; `inlay train` fills it in.
        rank_pattern: ranks that are left after a finished schedule, by the end of the sites' names.
    """

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "arXiv:2303.10512"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 30
    recipe: ClassVar[Recipe] = Recipe(learning_rate=2e-3)  # tuned (docs/quality.md); the paper's: 5e-4 to 2.2e-3
    default_where: ClassVar[tuple[str, ...]] = ("query", "key", "value", "attention_output", "gate", "up", "down")

    rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    warmup_steps: int | None = None
    final_steps: int | None = None
    interval: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    total_steps: int | None = None
    rank_pattern: Mapping[str, int] | Pattern[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank_pattern", frozen(self.rank_pattern))
        self.require(
            (1 <= self.target_rank <= self.rank, f"target_rank is {self.target_rank}, expected 1 to rank {self.rank}"),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}, expected at least 0 and below 1"),
            (0 < self.beta1 < 1 and 0 < self.beta2 < 1, "beta1 and beta2 must lie between 0 and 1"),
            (min(self.warmup_steps or 0, self.final_steps or 0) >= 0, "warmup_steps, final_steps: expected at least 0"),
            (self.interval is None or self.interval >= 1, f"interval is {self.interval}, expected at least 1"),
        )

    def schedule(self) -> tuple[int, int, int]:
        """t_i, T − t_f and Δ, or an error where the run's length is unknown or too short."""
        total = length_of_run(self.name, self.total_steps, 1 + (self.warmup_steps or 0) + (self.final_steps or 0))
        first = total // 10 if self.warmup_steps is None else self.warmup_steps
        last = min(total // 2 if self.final_steps is None else self.final_steps, total - first - 1)
        return first, total - last, self.interval or max(1, total // 1000)

    def budget(self, step: int, matrices: int) -> int:
        """The number of triplets kept at a step, counted from 1."""
        first, end, _ = self.schedule()
        left = min(1.0, max(0.0, 1 - (step - first) / (end - first)))
        return matrices * self.target_rank + int(matrices * (self.rank - self.target_rank) * left**3)

    def build(self, site: Site) -> Delta:
        rank = value_at(site.key, frozen(self.rank_pattern), self.rank)
        return Triplets(site, rank, self.alpha / self.rank, self.dropout, averages=not self.rank_pattern)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        return counted(super().pieces(view, places), self.rank_pattern)

    def clock(self, adapter: Adapter) -> Clock | None:
        return None if self.rank_pattern else Budget(adapter)

    def ready(self, adapter: Adapter) -> bool:
        done = steps_of(adapter)
        return done is None or (self.total_steps is not None and done >= self.schedule()[1])

    def stored(self, adapter: Adapter) -> tuple[Method, dict[str, Tensor]]:
        if self.rank_pattern or not self.ready(adapter):
            return super().stored(adapter)
        ranks, left = without_pruned(adapter)
        return replace(self, rank_pattern=ranks), left

    @classmethod
    def examples(cls) -> list[AdaLoRA]:
        short = cls(rank=3, target_rank=2, dropout=0.25, warmup_steps=0, final_steps=1, total_steps=4)
        return [short, cls(rank=2, target_rank=1, rank_pattern={"absent": 1})]


class Budget(Clock):
    """Shrinks the ranks as training goes on."""

    def before_step(self, optimizer: Optimizer) -> None:
        method, deltas = self._parts()
        scoring = int(deltas[0].steps.done) + 1 < method.schedule()[1]
        for delta in deltas:
            delta.regularise(method.orthogonality / (2 * len(deltas)))
            if scoring:
                delta.observe(method.beta1, method.beta2)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        method, deltas = self._parts()
        step, (first, end, interval) = deltas[0].steps.advance(), method.schedule()
        if step <= first or (step < end and step % interval):
            return
        scores = torch.cat([delta.scores().to(deltas[0].e.device) for delta in deltas])
        pruned = torch.ones_like(scores, dtype=torch.bool)
        pruned[scores.topk(method.budget(step, len(deltas))).indices] = False
        for delta, part in zip(deltas, pruned.split(method.rank), strict=True):
            delta.e.masked_fill_(part.to(delta.e.device), 0)

    def _parts(self) -> tuple[AdaLoRA, list[Triplets]]:
        return cast(AdaLoRA, self.adapter.method), cast(list[Triplets], self.adapter.modules())
