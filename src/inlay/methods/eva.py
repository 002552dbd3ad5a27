"""EVA: LoRA whose first matrix spans the layer's inputs, with higher ranks where that explains more variance.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
(later "Parameter Efficient Fine-tuning via Explained Variance Adaptation"), arXiv:2410.07170, algorithm 1.

    h = W x + s B A x        A (r_i, in) = the first right singular vectors of the layer's inputs, B (out, r_i) = 0

The base runs over batches of the fine-tuning data; an incremental decomposition (`_principal.py`, centred, as in the
authors' code) keeps the components of each layer's inputs until they turn by less than `tau` allows. Then
rank · (number of layers) components, those that explain the largest share of their layer's variance, are handed
out, at most rho · rank to a layer; a layer that gets none is left out. The ranks are stored in `rank_pattern`.

As in the authors' code in PEFT, positions that are padding or have no label are ignored, and the scale is alpha / rank
with the rank asked for, not the one found, so that all layers learn at one pace. Unlike there, the data is read once:
if it ends before all components have settled, what was seen is used. Places: every linear layer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.authoring import (
    IGNORED,
    Batches,
    ConfigError,
    Delta,
    DeltaMethod,
    DeltaPiece,
    Measured,
    ModelView,
    Pattern,
    Piece,
    Places,
    Recipe,
    Site,
    frozen,
    observe_inputs,
    select,
    value_at,
)
from inlay.methods._low_rank import check_sizes, low_rank
from inlay.methods._principal import Inputs, Principal


@dataclass(frozen=True, kw_only=True)
class EVA(DeltaMethod):
    """Low-rank update from the principal components of the inputs; attach with ``data=``.

    Attributes:
        rank: mean rank of the sites.
        alpha: numerator of the scale alpha / rank.
        dropout: dropout of the update's input, in training.
        rho: largest rank of a site divided by the mean; 1 gives every site the same rank.
        tau: a component counts as settled once its |cosine| with itself one batch earlier reaches this.
        labelled: consider positions with a label only.
        whiten: divide the components by the root of their singular values, as the authors do for vision.
        rank_pattern: the ranks that were found; do not give it.
    """

    name: ClassVar[str] = "eva"
    paper: ClassVar[str] = "arXiv:2410.07170"
    family: ClassVar[str] = "low rank"
    table_order: ClassVar[int] = 80
    recipe: ClassVar[Recipe] = Recipe(learning_rate=5e-4)  # the authors' choice for language models
    default_where: ClassVar[str] = "all-linear"
    needs_data: ClassVar[bool] = True

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    rho: float = 2.0
    tau: float = 0.99
    labelled: bool = True
    whiten: bool = False
    rank_pattern: Mapping[str, int] | Pattern[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank_pattern", frozen(self.rank_pattern))
        check_sizes(
            self,
            (self.rho >= 1, f"rho is {self.rho}, expected at least 1"),
            (0 <= self.tau <= 1, f"tau is {self.tau}, expected 0 to 1"),
        )

    def rank_at(self, site: Site) -> int:
        return value_at(site.key, frozen(self.rank_pattern), self.rank)

    def build(self, site: Site) -> Delta:
        return low_rank(site, self.rank_at(site), self.alpha / self.rank, self.dropout)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        sites = select(view, places, self.default_where, self.kinds)
        return [DeltaPiece(site, self.build(site)) for site in sites if self.rank_at(site)]

    def measure(self, model: nn.Module, places: Places, data: Batches) -> Measured:
        if self.rank_pattern:
            raise ConfigError("method 'eva' finds the ranks of its sites from data; leave rank_pattern out")
        sites = select(ModelView(model), places, self.default_where, self.kinds)
        modules = {site.path: site.module for site in sites}
        order = {path: i for i, path in enumerate(modules)}
        most = {site.path: min(round(self.rho * self.rank), site.in_features) for site in sites}
        inputs, masks = Inputs(list(most.values())), list[Tensor]()

        def batches() -> Iterator[Mapping[str, Any]]:
            for batch in data:
                masks[:] = _positions(model, batch, self.labelled)
                yield batch
                found = {site.key: inputs.of(order[site.path]) for site in sites}
                ranks = self.share(found)
                inputs.keep([part for key, part in found.items() if not part.settled(ranks[key], self.tau)])
                if inputs.done:
                    return

        observe_inputs(model, list(modules.values()), batches(), lambda i, x: inputs.see(i, x, _rows(x, masks)))
        found = {site.key: inputs.of(order[site.path]) for site in sites}
        ranks = self.share(found)
        if not any(ranks.values()):
            raise ConfigError("method 'eva' found no input that varies: `data` has too few positions with a label")
        values = {key: {"a": found[key].directions(n, whiten=self.whiten)} for key, n in ranks.items()}
        return Measured(dataclasses.replace(self, rank_pattern=ranks), values)

    def share(self, found: Mapping[str, Principal]) -> dict[str, int]:
        """Site → rank: chooses the components that explain most of their site's variance, on average `rank` a site."""
        shares = [(share, key) for key, part in found.items() for share in part.explained().tolist() if share > 0]
        best = sorted(shares, key=lambda pair: -pair[0])[: self.rank * len(found)]
        counts = Counter(key for _, key in best)
        return {key: counts[key] for key in found}

    @classmethod
    def examples(cls) -> list[EVA]:
        return [cls(rank=2), cls(rank=3, rho=1.0, dropout=0.25, whiten=True)]


def _positions(model: nn.Module, batch: Mapping[str, Any], labelled: bool) -> list[Tensor]:
    """Masks of the positions to consider, (rows, tokens): one, or one for each side of an encoder–decoder."""
    named = {"attention_mask": batch.get("attention_mask"), "labels": batch.get("labels") if labelled else None}
    masks = {k: v.bool() if k == "attention_mask" else v != IGNORED for k, v in named.items() if v is not None}
    flat = [m for m in masks.values() if m.dim() == 2]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return flat
    same = len(flat) == 2 and flat[0].shape == flat[1].shape
    return [flat[0] & flat[1]] if same else flat[:1]


def _rows(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The vectors of an input to consider, (rows, features); all of them if not exactly one mask has its shape."""
    fitting = [m for m in masks if m.shape == x.shape[:-1]]
    return x[fitting[0].to(x.device)] if len(fitting) == 1 else x.flatten(0, -2)
