"""LoRA+: LoRA whose second matrix learns faster than its first.

Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354, section 4.

    h = W x + s B A x        rate of B = ratio · rate of A        A (rank, in), B (out, rank), s = alpha / rank

In a wide model, A and B learn features at the same pace only if B's rate is higher by a factor that grows with the
width; the authors advise a fixed ratio of 2⁴ and tuning A's rate. Initialisation is LoRA's (A Kaiming-uniform, B zero),
which the argument assumes. At embeddings LoRA starts the other way round, so they are not adapted.

The ratio is in the optimizer's parameter groups: ``adapter.parameter_groups(rate)`` makes them, and `inlay train` uses
it. An optimizer that gives both matrices one rate would train plain LoRA, so its step is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.optim import Optimizer

from inlay.authoring import Adapter, Clock, ConfigError, Delta, DeltaMethod, DeltaPiece, Kind, Recipe, Site
from inlay.methods._low_rank import check_sizes, low_rank


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(DeltaMethod):
    """Low-rank update with a rate for each matrix.

    Attributes:
        rank: rank of the update.
        alpha: numerator of the scale alpha / rank.
        dropout: dropout of the update's input, in training.
        ratio: learning rate of B divided by that of A.
    """

    name: ClassVar[str] = "lora-plus"
    paper: ClassVar[str] = "arXiv:2402.12354"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 40
    # A's rate; B's is 16 times that. The paper's best rates for A lie below LoRA's single one, for B above it.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=2e-4)
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    ratio: float = 16.0

    def __post_init__(self) -> None:
        check_sizes(self, (self.ratio > 0, f"ratio is {self.ratio}, expected more than 0"))

    def build(self, site: Site) -> Delta:
        return low_rank(site, self.rank, self.alpha / self.rank, self.dropout)

    def rate_of(self, name: str) -> float:
        return self.ratio if name.startswith("delta/") and name.endswith("/b") else 1.0

    def clock(self, adapter: Adapter) -> Clock:
        return RatioCheck(adapter)

    @classmethod
    def examples(cls) -> list[LoRAPlus]:
        return [cls(rank=2), cls(rank=2, dropout=0.25, ratio=4.0)]


class RatioCheck(Clock):
    """Raises before the step of an optimizer that gives the matrices of a site another ratio of rates."""

    def before_step(self, optimizer: Optimizer) -> None:
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        ratio: float = self.adapter.method.ratio  # type: ignore[attr-defined]
        for piece in self.adapter.pieces:
            assert isinstance(piece, DeltaPiece)
            a, b = (rates.get(id(getattr(piece.delta, name))) for name in ("a", "b"))
            if a is None or b is None or math.isclose(b, ratio * a, rel_tol=1e-6):
                continue
            raise ConfigError(
                f"method 'lora-plus' trains B at {ratio:g} times the rate of A, but at {piece.key} this optimizer has "
                f"{a:g} for A and {b:g} for B; build it from adapter.parameter_groups(rate), where rate is that of A"
            )
