"""LoReFT: the residual stream is edited in a low-rank subspace, at the first and last tokens of the prompt.

Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", arXiv:2404.03592, equation 2, section 3.3.

    h ← h + Rᵀ(W h + b − R h)          R (rank, d) with orthonormal rows, W (rank, d), b (rank), behind every block

R is the Q of the QR decomposition of a free matrix, with the signs that make it unique. So R is orthonormal at every
step, and the free matrix is stored, bit for bit. (The official code keeps a (d, d) base beside it and restores R only
approximately.) As there, R starts orthogonal and W, b as a linear layer of PyTorch's, so a fresh adapter already
changes the output; dropout acts on the edited states; a prompt of L tokens is edited at min(prefix, L // 2) and
min(suffix, L // 2) of them. In generation only the prompt is edited. In an encoder the prompt is the row without
padding; in an encoder–decoder it is what the encoder reads, so the decoder has no edits, unless every position is
edited; then both have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import (
    Delta,
    DeltaMethod,
    Kind,
    ModelView,
    Piece,
    Places,
    Recipe,
    SelectionError,
    Site,
    cast,
    current_span,
    widened,
)


@dataclass(frozen=True, kw_only=True)
class LoReFT(DeltaMethod):
    """Low-rank linear subspace ReFT.

    Attributes:
        rank: rank of the subspace.
        prefix, suffix: how many first and last tokens of the prompt are edited; None for both edits every position.
        tied: whether first and last tokens share one edit, or each has its own.
        dropout: dropout of the edited states, in training.
    """

    name: ClassVar[str] = "loreft"
    paper: ClassVar[str] = "arXiv:2404.03592"
    family: ClassVar[str] = "representation"
    table_order: ClassVar[int] = 10
    # The paper's for commonsense and arithmetic reasoning: 9e-4, linear, a tenth of warm-up.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=9e-4, warmup=0.1)
    default_where: ClassVar[str] = "block_output"
    kinds: ClassVar[tuple[Kind, ...]] = ("output",)
    expected_failures: ClassVar[dict[str, str]] = {"identity": "R and W start at random, as in the official code"}

    rank: int = 8
    prefix: int | None = 7
    suffix: int | None = 7
    tied: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        both = (self.prefix is None) == (self.suffix is None)
        self.require(
            (self.rank >= 1, f"rank is {self.rank}, expected at least 1"),
            (both, "prefix and suffix must both be numbers (0 leaves one out), or both None for every position"),
            (min(self.prefix or 0, self.suffix or 0) >= 0, "prefix and suffix must be at least 0"),
            ((self.prefix, self.suffix) != (0, 0), "prefix=0 and suffix=0 leave no position to edit"),
            (self.tied or bool(self.prefix and self.suffix), "untied edits need a prefix and a suffix"),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}, expected at least 0 and below 1"),
        )

    def build(self, site: Site) -> Delta:
        if self.rank > site.out_features:
            raise SelectionError(f"rank {self.rank} exceeds the {site.out_features} features of {site.path}")
        return Everywhere(site, self) if self.prefix is None else AtPrompt(site, self)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found = super().pieces(view, places)
        if self.prefix is None or not getattr(view.config, "is_encoder_decoder", False):
            return found
        encoder: Any = view.model.get_encoder()  # type: ignore[operator]
        kept = [p for p in found if any(view.modules[p.key] is m for m in encoder.modules())]
        if not kept:
            raise SelectionError(
                "the prompt is in the encoder: choose layers of the encoder, or prefix=None and suffix=None"
            )
        return kept

    @classmethod
    def examples(cls) -> list[LoReFT]:
        few, every = cls(rank=2, prefix=2, suffix=3), cls(rank=2, prefix=None, suffix=None, dropout=0.1)
        return [few, cls(rank=3, prefix=3, suffix=1, tied=False), every]


class Edit(nn.Module):
    """Rᵀ(W h + b − R h)."""

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.free = nn.Parameter(site.empty(site.out_features, rank))  # (d, rank); R is computed from it
        self.source = nn.Parameter(site.empty(rank, site.out_features))  # W (rank, d)
        self.bias = nn.Parameter(site.empty(rank))  # b (rank)

    def reset(self) -> None:
        nn.init.orthogonal_(self.free)
        nn.init.kaiming_uniform_(self.source, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -1, 1).mul_(self.source.shape[1] ** -0.5)

    def forward(self, h: Tensor) -> Tensor:
        q, r = torch.linalg.qr(widened(self.free))
        rotation = (q * r.diagonal().sign()).t()  # R (rank, d)
        difference = nn.functional.linear(h, cast(self.source - rotation, h), cast(self.bias, h))  # (..., rank)
        return difference @ cast(rotation, h)


class Everywhere(Delta):
    """One edit at every position."""

    merges: ClassVar[bool] = False

    def __init__(self, site: Site, method: LoReFT) -> None:
        super().__init__()
        self.method = method
        self.edits = nn.ModuleList(Edit(site, method.rank) for _ in range(1 if method.tied else 2))

    def initialise(self, site: Site) -> None:
        self.edits.apply(lambda module: module.reset() if isinstance(module, Edit) else None)

    def edited(self, y: Tensor, which: int = 0) -> Tensor:
        return nn.functional.dropout(y + self.edits[which](y), self.method.dropout, self.training)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return self.edited(y)


class AtPrompt(Everywhere):
    """Edits at the first and last tokens of each row's prompt."""

    reads_span: ClassVar[bool] = True

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        first, behind = current_span(site).clamp(max=y.shape[1])[:, :, None].unbind(1)  # (rows, 1)
        at = torch.arange(y.shape[1], device=y.device)
        half = (behind - first) // 2
        early = (at >= first) & (at < first + half.clamp(max=self.method.prefix or 0))  # (rows, tokens)
        late = (at < behind) & (at >= behind - half.clamp(max=self.method.suffix or 0))
        if self.method.tied:
            return torch.where((early | late)[..., None], self.edited(y), y)
        y = torch.where(early[..., None], self.edited(y), y)
        return torch.where(late[..., None], self.edited(y, 1), y)
