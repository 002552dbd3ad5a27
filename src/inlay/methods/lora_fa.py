"""LoRA-FA: LoRA whose first matrix is frozen at its random start.

Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
arXiv:2308.03303.

    h = W x + s B A x        A (rank, in) random and frozen, B (out, rank) trained from zero; s = alpha / rank

For the backward pass only A x, (…, rank), is kept instead of x, (…, in), which saves the memory. The second version of
the paper corrects B's gradient, so that the change of B A is as close as possible to that of full fine-tuning:

    ∂B ← ∂B (A Aᵀ)⁻¹ / s²

`corrected=False` is the first version, without it. PEFT's optimizer for LoRA-FA does the same as `corrected`; here
it happens before the step of any optimizer. A is drawn as in LoRA (Kaiming-uniform; the paper says "random").
At embeddings LoRA's A starts at zero and could never learn, so embeddings are not adapted. Places: every linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from inlay.authoring import Adapter, Clock, Delta, DeltaMethod, DeltaPiece, Kind, Recipe, Site, stamp, widened
from inlay.methods._low_rank import check_sizes, low_rank


@dataclass(frozen=True, kw_only=True)
class LoRAFA(DeltaMethod):
    """Low-rank update with a frozen first matrix.

    Attributes:
        rank: rank of the update.
        alpha: numerator of the scale alpha / rank.
        dropout: dropout of the update's input, in training.
        corrected: whether B's gradient is corrected as in the paper's second version.
    """

    name: ClassVar[str] = "lora-fa"
    paper: ClassVar[str] = "arXiv:2308.03303"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 50
    # As LoRA's: Adam's step does not depend on the gradient's size, which is all that the scale s changes.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3)  # tuned (docs/quality.md)
    default_where: ClassVar[str] = "all-linear"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    corrected: bool = True

    def __post_init__(self) -> None:
        check_sizes(self)

    def build(self, site: Site) -> Delta:
        delta = low_rank(site, self.rank, self.alpha / self.rank, self.dropout)
        drawn = delta._parameters.pop("a")
        assert drawn is not None
        delta.register_buffer("a", drawn.data)  # stored, not trained, not counted
        return delta

    def clock(self, adapter: Adapter) -> Clock | None:
        return Correction(adapter) if self.corrected else None

    @classmethod
    def examples(cls) -> list[LoRAFA]:
        return [cls(rank=2), cls(rank=4, alpha=1.0, dropout=0.25, corrected=False)]


class Correction(Clock):
    """Replaces each B's gradient with the corrected one."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter)
        self.inverses: dict[str, tuple[tuple[int, int, int], Tensor]] = {}  # valid until A's values change

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for piece in self.adapter.pieces:
            assert isinstance(piece, DeltaPiece)
            b = piece.delta.get_parameter("b")
            if b.grad is not None and id(b) in held:
                b.grad.copy_(widened(b.grad) @ self.inverse(piece.key, piece.delta))

    def inverse(self, key: str, delta: Delta) -> Tensor:
        """(A Aᵀ)⁻¹ / s², (rank, rank); the pseudo-inverse, in case A has less than full rank."""
        a, scale = delta.get_buffer("a"), getattr(delta, "scale", 1.0)
        which = stamp(a)
        if key not in self.inverses or self.inverses[key][0] != which:
            rows = widened(a.flatten(1))
            with torch.autocast(a.device.type, enabled=False):  # whose products are in 16 bits, which have no inverse
                self.inverses[key] = (which, torch.linalg.pinv(rows @ rows.t(), hermitian=True) / scale**2)
        return self.inverses[key][1]
