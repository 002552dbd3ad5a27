"""PiSSA: a low-rank update that starts as the weight's principal part.

Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv:2404.02948, equations 2–5.

    W = U S Vᵀ        A₀ = √(S_r / s) V_rᵀ, B₀ = U_r √(S_r / s), so that s B₀ A₀ is the best rank-r part of W
    h = W x + s (B A − B₀ A₀) x        A (rank, in), B (out, rank) start as A₀, B₀; s = alpha / rank

The paper trains with s = 1 (alpha equal to the rank), which is what alpha=None gives; dividing the singular values by
another s, as the authors' code in PEFT does, keeps the start exact. The paper writes the rest of the weight,
W − s B₀ A₀, into the base; here the offset stays in the adapter (`_offset.py`), which computes the same.

The singular values come from an exact decomposition, or, if `niter` is given, from the randomised one of Halko
et al. with that many power iterations (the paper's fast SVD: seconds instead of minutes). Places: every linear
layer of the blocks. The authors train without dropout, which would drop principal parts of W itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from inlay.authoring import Delta, DeltaMethod, Recipe, Site
from inlay.methods._low_rank import check_sizes
from inlay.methods._offset import Factors, Offset

OVERSAMPLING = 8  # columns beyond the rank, which make the last ones of the randomised decomposition more exact


@dataclass(frozen=True, kw_only=True)
class PiSSA(DeltaMethod):
    """Low-rank update from the principal singular vectors.

    Attributes:
        rank: rank of the update; at most the smaller side of every adapted weight.
        alpha: numerator of the scale alpha / rank; None is the rank, as in the paper.
        niter: power iterations of the fast randomised decomposition; None computes it exactly.
    """

    name: ClassVar[str] = "pissa"
    paper: ClassVar[str] = "arXiv:2404.02948"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 60
    # The factors start large, so their steps are smaller than LoRA's; the paper's tables use 2e-5 with batches of 128.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=6e-4, schedule="cosine", warmup=0.03)  # tuned (docs/quality.md)
    default_where: ClassVar[str] = "all-linear"

    rank: int = 8
    alpha: float | None = None
    niter: int | None = None

    def __post_init__(self) -> None:
        check_sizes(
            self,
            (self.alpha is None or self.alpha > 0, f"alpha is {self.alpha}, expected more than 0, or None"),
            (self.niter is None or self.niter >= 0, f"niter is {self.niter}, expected at least 0, or None"),
        )

    def build(self, site: Site) -> Delta:
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return Offset(site, self.rank, scale, partial(principal, rank=self.rank, scale=scale, niter=self.niter))

    @classmethod
    def examples(cls) -> list[PiSSA]:
        return [cls(rank=2), cls(rank=4, alpha=2.0, niter=4)]


def principal(weight: Tensor, *, rank: int, scale: float, niter: int | None) -> Factors:
    """A (rank, in) and B (out, rank) whose product, times the scale, is the principal part of the weight."""
    if niter is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=min(rank + OVERSAMPLING, *weight.shape), niter=niter)
        vh = v.t()
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
