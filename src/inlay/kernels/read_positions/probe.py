"""What a trial gives the copy of a model: rows of the caller's in which nothing but the mask says what is where.

masks      padding at the right, at the left, anywhere, and none
tokens     in another order over all rows; each special token of the configuration once a row, at a masked position
           of one row and at another of the next, and at no first one
the rest   whatever else has an entry for every position, in another order, too
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = 8  # two of each mask


@dataclass(frozen=True)
class Batch:
    """What a model is called with.

    Attributes:
        given: its arguments by name.
        rows, tokens: of its text.
        text: the name of the tokens, or of their embeddings.
        mask: the name of the padding mask, None where there is none.
        padding: the padding token, where the text is tokens and it is known.
    """

    given: dict[str, Any]
    rows: int
    tokens: int
    text: str
    mask: str | None = None
    padding: int | None = None

    def by_position(self, value: Any) -> bool:
        """Whether an argument has an entry for every position."""
        return isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (self.rows, self.tokens)


def drawn(batch: Batch, config: Any, agreeing: bool, seed: int) -> tuple[dict[str, Any], Tensor]:
    """Arguments for the model, and which positions of them are not masked, (ROWS, tokens).

    Args:
        config: of the model, for its special tokens.
        agreeing: whether the padding token is what is masked, and nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(batch.rows, generator=generator)[torch.arange(ROWS) % batch.rows]
    order = torch.randperm(ROWS * batch.tokens, generator=generator)
    given = dict(batch.given)
    for name, value in batch.given.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch.rows:
            given[name] = value[rows]
        if batch.by_position(value):
            given[name] = given[name].flatten(0, 1)[order].unflatten(0, (ROWS, batch.tokens))
    unmasked = torch.ones(ROWS, batch.tokens, dtype=torch.bool)
    if batch.mask is not None:
        unmasked = torch.cat([masks(batch.tokens, generator) for _ in range(2)])
        given[batch.mask] = unmasked.to(given[batch.mask].dtype)
    if not given[batch.text].is_floating_point():
        padding = batch.padding if agreeing else None
        given[batch.text] = _text(given[batch.text], unmasked, _special(config), padding, generator)
    return given, unmasked


def masks(tokens: int, generator: torch.Generator) -> Tensor:
    """Rows whose padding is at the right, at the left, anywhere with both ends, and nowhere: true is text."""
    at = torch.arange(tokens)
    holes = torch.rand(tokens, generator=generator) < 0.5
    holes[[0, -1]], holes[tokens // 2] = False, True
    return torch.stack([at < max(2, 2 * tokens // 3), at >= tokens // 3, holes, at >= 0])


def with_first(unmasked: Tensor) -> Tensor:
    """The positions that are not masked, and every row's first: what pools the first reads it in any case."""
    return unmasked.index_fill(1, torch.tensor(0), True)


def _special(config: Any) -> list[int]:
    """The special tokens that a configuration names."""
    size = getattr(config, "vocab_size", 0)
    values = (v for n, v in getattr(config, "__dict__", {}).items() if n.endswith("_token_id"))
    return sorted({v for v in values if type(v) is int and 0 <= v < size})


def _text(ids: Tensor, unmasked: Tensor, special: list[int], padding: int | None, generator: torch.Generator) -> Tensor:
    """Tokens with each special one once a row; with padding, where it is given, at all masked positions only."""
    plain = ids[~torch.isin(ids, torch.tensor(special))]
    if plain.numel():
        others = plain[torch.randint(plain.numel(), ids.shape, generator=generator)]
        ids = torch.where(torch.isin(ids, torch.tensor(special)), others, ids)
    made = ids.clone()
    for number, (row, text) in enumerate(zip(made, unmasked, strict=True)):
        free = torch.randperm(len(row) - 1, generator=generator) + 1
        wanted = text[free] if (number + number // 4) % 2 else ~text[free]
        places = torch.cat([free[wanted], free[~wanted]]).tolist()
        for place, token in zip(places, (token for token in special if token != padding), strict=False):
            row[place] = token
    return made if padding is None else made.masked_fill(~unmasked, padding)
