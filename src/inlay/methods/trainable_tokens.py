"""Trainable tokens: new values for chosen rows of the vocabulary.

No paper; known from Hugging Face PEFT, whose files hold the same rows. For new words and control tokens.

    embedding[token] = v[token]               v (tokens, dim) starts as the base's own rows
    head(h)[token]   = h · v[token] + bias    where the output head is tied to the embedding

A tied head uses the same values. An untied head stays as it is, unless `head` asks for new rows there too. An embedding
that scales what it looks up (Gemma) runs with its own class on the new rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import (
    Delta,
    DeltaPiece,
    Method,
    ModelView,
    Piece,
    Places,
    Recipe,
    SelectionError,
    Shared,
    Site,
    UnsupportedError,
    cast,
)
from inlay.methods._twin import twin


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """New values for single entries of the vocabulary.

    Attributes:
        tokens: ids of the tokens; ``tokenizer.convert_tokens_to_ids([...])`` gives them.
        head: also train their rows of the output head, if it is not tied.
    """

    name: ClassVar[str] = "trainable-tokens"
    paper: ClassVar[str] = "none"
    family: ClassVar[str] = "selective"
    table_order: ClassVar[int] = 30
    # Embeddings are about 0.02 in size and AdamW's step is the rate itself: a tenth of an entry at the peak.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=2e-3)
    default_where: ClassVar[str] = "input"

    tokens: tuple[int, ...] = ()
    head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        self.require(
            (all(t >= 0 for t in self.tokens), f"tokens holds negative ids: {[t for t in self.tokens if t < 0]}"),
            (len(set(self.tokens)) == len(self.tokens), "tokens names an id twice"),
        )

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:

        if (places.where, places.layers) != (None, None):
            raise SelectionError(
                "method 'trainable-tokens' acts at the vocabulary: it takes no `where` and no `layers`"
            )
        if not self.tokens:
            raise SelectionError(
                "method 'trainable-tokens' needs the tokens to train: give tokens=(id, ...), for example "
                "tokens=tuple(tokenizer.convert_tokens_to_ids(['<tool>', '</tool>']))"
            )
        table = None if view.input_embedding is None else view.input_embedding._parameters.get("weight")
        tied = [s for s in view.layers.values() if table is not None and s.module._parameters.get("weight") is table]
        if not any(s.kind == "embedding" for s in tied):
            raise UnsupportedError(f"{type(view.model).__name__} has no table of token embeddings to train rows of")
        rows = Rows("tokens", tied[0], self.tokens)
        sites = [(site, rows) for site in tied]
        own = next((s for s in view.layers.values() if s.module is view.output_head and s not in tied), None)
        sites += [(own, Rows("head", own, self.tokens))] if self.head and own is not None else []
        return [DeltaPiece(s, TokenDelta(s, r) if s.kind == "embedding" else ScoreDelta(s, r)) for s, r in sites]

    @classmethod
    def examples(cls) -> list[TrainableTokens]:
        return [cls(tokens=tuple(range(60, 2, -3))), cls(tokens=tuple(range(3, 50)), head=True)]


class Rows(Shared):
    """The new values, in the order in which the tokens were given."""

    ids: Tensor

    def __init__(self, key: str, site: Site, tokens: tuple[int, ...]) -> None:
        super().__init__(key)
        entries, dim = (site.in_features, site.out_features)[:: 1 if site.kind == "embedding" else -1]
        beyond = [t for t in tokens if t >= entries]
        if beyond:
            raise SelectionError(
                f"tokens {', '.join(map(str, beyond[:8]))} lie beyond the {entries} entries of {site.path}: call "
                "model.resize_token_embeddings(len(tokenizer)) before attaching"
            )
        self.path, self.tokens = site.path, tokens
        self.values = nn.Parameter(site.empty(len(tokens), dim))  # (tokens, dim)
        self.register_buffer("ids", torch.tensor(tokens, device=site.device), persistent=False)

    def initialise(self, view: ModelView) -> None:
        self.values.copy_(self.base(view.layers[self.path]))

    def base(self, site: Site) -> Tensor:
        weight, _ = site.read_weight()  # the base's own rows, (tokens, dim)
        return weight[:, self.ids].t() if site.kind == "embedding" else weight[self.ids]


class TokenDelta(Delta):
    """Chosen tokens are looked up in the new rows."""

    known: Tensor  # the tokens in ascending order, for binary search
    order: Tensor  # the row of each of them

    def __init__(self, site: Site, rows: Rows) -> None:
        super().__init__()
        if site.module.__dict__.get("max_norm") is not None:
            raise UnsupportedError(f"{site.path} renormalises its rows while it looks them up (max_norm)")
        self.rows = rows
        self.table = twin(site, rows, {"weight": "values"}, site.dtype)
        self.table.__dict__["padding_idx"] = None  # an index of the base's table, not of this one
        order = sorted(range(len(rows.tokens)), key=rows.tokens.__getitem__)
        for name, numbers in (("known", sorted(rows.tokens)), ("order", order)):
            self.register_buffer(name, torch.tensor(numbers, device=site.device), persistent=False)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        at = torch.searchsorted(self.known, x.long()).clamp(max=len(self.known) - 1)
        chosen = self.known[at] == x  # (rows, tokens)
        return torch.where(chosen[..., None], self.table(self.order[at]).to(y.dtype), y)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(1, self.rows.ids, self.rows.values.t().to(weight.dtype)), bias


class ScoreDelta(Delta):
    """Chosen tokens are scored with the new rows."""

    def __init__(self, site: Site, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        moved = cast(self.rows.values - self.rows.base(site), x)  # (tokens, dim), exactly zero at first
        return y.index_add(-1, self.rows.ids, (x @ moved.t()).to(y.dtype))

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.rows.ids, self.rows.values.to(weight.dtype)), bias
