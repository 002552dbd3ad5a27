"""LoftQ: a quantised weight and a low-rank pair whose sum starts near the full weight.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv:2310.08659, algorithm 1.

    Q₀ = q(W);  for t = 1 … T:   Q_t = q(W − s B_{t−1} A_{t−1})        s B_t A_t = SVD_rank(W − Q_t)
    h = Q x + s B A x            A (rank, in), B (out, rank): √σ each; Q in 4 or 2 bits, blocks of 64

The adapter stores Q as packed codes with one constant for each block; the base is never written and can serve other
adapters. The layer's output is shifted by (Q − W) x, with Q unpacked from its codes in each pass, forward and backward,
so that no full matrix is kept. The iterate with the smallest ‖W − Q − s B A‖ is taken (the paper takes the last), so
the start is never worse than plain quantisation. The paper has s = 1, which is what alpha=None gives; for another s the
factors are divided by it (the authors' code and PEFT ignore s, so they start elsewhere). On a base that is quantised
already, W is read from its files; bits=None takes the base's own codes as Q: W − Q is decomposed once, and the base's
memory does not grow. iterations=0 is the paper's comparison, QLoRA: Q = q(W), B zero. Places: every linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from inlay.authoring import (
    DeltaMethod,
    DeltaPiece,
    ModelView,
    Originals,
    Pattern,
    Piece,
    Places,
    Recipe,
    SelectionError,
    Site,
    frozen,
    problems,
)
from inlay.kernels.normal_float import LEVELS
from inlay.methods._backbone import Alternation, Backbone
from inlay.methods._low_rank import check_sizes


@dataclass(frozen=True, kw_only=True)
class LoftQ(DeltaMethod):
    """Low-rank update beside a backbone of 4 or 2 bits that is chosen together with it.

    Attributes:
        rank: rank of the update; at most the smaller side of every adapted weight.
        alpha: numerator of the scale alpha / rank; None is the rank, as in the paper.
        dropout: dropout of the update's input, in training.
        bits: 4 or 2; None takes the codes of a quantised base as they are.
        bits_pattern: bits for single sites, by consecutive names of their paths: ``{"layers.0": 4, "down_proj": 2}``.
        iterations: T; 0 is plain quantisation beside LoRA's start.
        niter: power iterations of a randomised decomposition (seconds instead of minutes for large matrices); None
            computes it exactly.
    """

    name: ClassVar[str] = "loftq"
    paper: ClassVar[str] = "arXiv:2310.08659"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 90
    recipe: ClassVar[Recipe] = Recipe(learning_rate=5e-4)  # the upper end of the paper's search on GLUE
    default_where: ClassVar[str] = "all-linear"
    expected_failures: ClassVar[Mapping[str, str]] = {"identity": "the backbone has fewer bits than the base"}

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    bits: int | None = 4
    bits_pattern: Mapping[str, int] | Pattern[int] = ()
    iterations: int = 5
    niter: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits_pattern", frozen(self.bits_pattern))
        given = [b for _, b in frozen(self.bits_pattern)] + ([] if self.bits is None else [self.bits])
        check_sizes(
            self,
            (self.alpha is None or self.alpha > 0, f"alpha is {self.alpha}, expected more than 0, or None"),
            (all(b in LEVELS for b in given), f"bits are {given}, expected 4 or 2, or None for the base's own codes"),
            (self.iterations >= 0, f"iterations is {self.iterations}, expected at least 0"),
            (self.niter is None or self.niter >= 0, f"niter is {self.niter}, expected at least 0, or None"),
        )

    def build(self, site: Site) -> Backbone:
        fitting = [(len(part), b) for part, b in frozen(self.bits_pattern) if f".{part}." in f".{site.key}."]
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        plan = Alternation(self.rank, scale, max(fitting)[1] if fitting else self.bits, self.iterations, self.niter)
        return Backbone(site, plan, self.dropout)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found = super().pieces(view, places)
        originals = Originals(str(getattr(view.model, "name_or_path", None) or ""))
        keys = [f".{piece.key}." for piece in found]
        wrong = [f"bits_pattern: {p!r} fits none of the chosen sites" for p, _ in frozen(self.bits_pattern)
                 if not any(f".{p}." in key for key in keys)]  # fmt: skip
        for piece in found:
            if isinstance(piece, DeltaPiece) and isinstance(piece.delta, Backbone):
                piece.delta.originals = originals
        if wrong:
            raise SelectionError(problems("method 'loftq'", wrong))
        return found

    def account(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """‖W − q(W)‖ and ‖W − Q − s B A‖ at the start, divided by ‖W‖, for each layer."""
        ends = {n.removeprefix("delta/").removesuffix("/errors"): n for n in tensors if n.endswith("/errors")}
        found = {key: [round(e, 6) for e in tensors[n].tolist()] for key, n in sorted(ends.items())}
        return {"reconstruction": {key: {"plain": plain, "start": start} for key, (plain, start) in found.items()}}

    @classmethod
    def examples(cls) -> list[LoftQ]:
        return [cls(rank=2, bits=2, iterations=2), cls(rank=4, alpha=1.0, iterations=1), cls(rank=2, iterations=0)]
