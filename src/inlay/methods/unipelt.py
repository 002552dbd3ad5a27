"""UniPELT: an adapter, a prefix and LoRA, each with a gate that depends on its input.

Mao et al. 2021, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", arXiv:2110.07577,
section 3, figure 1.

    feed-forward:  y ← y + G_A(y) · W_up relu(W_down y)          G(h) = σ(w · h + b), one number for each token
    attention:     P_K, P_V ← G_P(h) P_K, G_P(h) P_V              h is the layer's input; the text's own pairs stay
    query, value:  y ← y + G_L(x) · B A x                         the gate replaces LoRA's scale

Sizes as in the paper: a Pfeiffer adapter of reduction 16, a prefix of 10 with its MLP, LoRA of rank 8. As in the
authors' code each projection has a gate of its own; the adapter's gate starts normal with σ = 0.02 and zero bias, the
others as torch's linear layers. The paper's gate is a function of the input; the code averages it over all positions
of the padded row. We follow the paper and gate every token by itself: a mean would depend on the padding, and in a
decoder it would let a token see the ones after it, so that generating with a cache would differ from generating
without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import (
    Delta,
    DeltaPiece,
    KeyValuePrompt,
    KeyValues,
    Method,
    ModelView,
    Piece,
    Places,
    PromptPiece,
    Recipe,
    SelectionError,
    Site,
    cast,
    select,
)
from inlay.methods._low_rank import LowRank
from inlay.methods.pfeiffer import Pfeiffer
from inlay.methods.prefix_tuning import PrefixTuning


@dataclass(frozen=True, kw_only=True)
class UniPELT(Method):
    """Gated adapter, prefix and LoRA.

    Attributes:
        reduction: reduction of the adapter.
        length: length of the prefix.
        projection: inner size of the prefix's MLP; None trains the prefix itself.
        rank: rank of LoRA.
    """

    name: ClassVar[str] = "unipelt"
    paper: ClassVar[str] = "arXiv:2110.07577"
    family: ClassVar[str] = "composition"
    table_order: ClassVar[int] = 50
    recipe: ClassVar[Recipe] = Recipe(learning_rate=5e-4)  # the paper's
    default_where: ClassVar[tuple[str, ...]] = ("query", "value", "mlp_sublayer")
    expected_failures: ClassVar[Mapping[str, str]] = PrefixTuning.expected_failures

    reduction: int = 16
    length: int = 10
    projection: int | None = 512
    rank: int = 8

    def __post_init__(self) -> None:
        self.require((self.rank >= 1, f"rank is {self.rank}, expected at least 1"))
        assert self._adapter and self._prefix  # they check their sizes

    @property
    def _adapter(self) -> Pfeiffer:
        return Pfeiffer(reduction=self.reduction)

    @property
    def _prefix(self) -> PrefixTuning:
        return PrefixTuning(length=self.length, projection=self.projection)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        if places.where is not None:
            raise SelectionError(
                "method 'unipelt' has three kinds of places, so it takes no `where`; `layers` chooses layers"
            )
        found: list[Piece] = [PromptPiece("prompt", GatedPrefix(self._prefix, view, places.layers))]
        for site in select(view, places, ("query", "value"), ("linear",)):
            found.append(DeltaPiece(site, Gated(site, LowRank(site, self.rank, scale=1.0), entering=True)))
        for piece in self._adapter.pieces(view, places):
            assert isinstance(piece, DeltaPiece)
            found.append(replace(piece, delta=Gated(piece.site, piece.delta, entering=False)))
        return found

    @classmethod
    def examples(cls) -> list[UniPELT]:
        return [cls(reduction=2, length=3, projection=6, rank=2)]


class Gated(Delta):
    """What another delta adds, times σ(w · h + b) for each token; h is the layer's input, or its output."""

    merges: ClassVar[bool] = False

    def __init__(self, site: Site, inner: Delta, *, entering: bool) -> None:
        super().__init__()
        self.inner, self.entering = inner, entering
        self.gate = nn.Parameter(site.empty(1, site.in_features if entering else site.out_features))  # (1, in)
        self.gate_bias = nn.Parameter(site.empty(1))

    def initialise(self, site: Site) -> None:
        self.inner.initialise(site)
        if self.entering:
            _as_linear(self.gate, self.gate_bias)
        else:
            nn.init.normal_(self.gate, std=0.02)
            nn.init.zeros_(self.gate_bias)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        seen = x if self.entering else y
        share = F.linear(seen, cast(self.gate, seen), cast(self.gate_bias, seen)).sigmoid()  # (..., 1)
        return y + share * (self.inner.post(x, y, site) - y)


class GatedPrefix(KeyValuePrompt):
    """A prefix whose pairs are weighed by the input of each attention module."""

    weighed: ClassVar[bool] = True

    def __init__(self, method: PrefixTuning, view: ModelView, layers: tuple[int, ...] | None) -> None:
        super().__init__()
        self.prefix, self.length = method.build(view, layers), method.length
        held = next(self.prefix.parameters())
        self.paths = [p.path for p in view.attention_places() if layers is None or p.layer in layers]
        count = len(self.paths)
        self.gate = nn.Parameter(held.new_empty(count, view.hidden_size))  # (attention modules, hidden)
        self.gate_bias = nn.Parameter(held.new_empty(count))

    def initialise(self, view: ModelView) -> None:
        self.prefix.initialise(view)
        _as_linear(self.gate, self.gate_bias)

    def keys_values(self) -> KeyValues:
        pairs = self.prefix.keys_values()
        gates = {path: (self.gate[i], self.gate_bias[i]) for i, path in enumerate(self.paths)}
        return {
            path: (*pair, gates[path][0].expand(self.length, -1), gates[path][1].expand(self.length))
            for path, pair in pairs.items()
        }


def _as_linear(weight: Tensor, bias: Tensor) -> None:
    """Fill as torch does a linear layer with one output: uniform within 1 / √in."""
    for tensor in (weight, bias):
        nn.init.uniform_(tensor, -1 / math.sqrt(weight.shape[1]), 1 / math.sqrt(weight.shape[1]))
