"""The batches of a trial: some of the caller's rows, rearranged so that only the mask tells where a text is.

masks      padding on the right, on the left, anywhere, nowhere
tokens     shuffled over all rows; each special token of the configuration once in every row, at a masked position
           in one row and at an unmasked one in the next, never at the first
the rest   every other argument with an entry for each position is shuffled as well
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = 8  # two with each mask
SHARE = 4  # a trial has a quarter of the caller's positions: it keeps about twice as much of each as a step
FEWEST_TOKENS = 16  # but no shorter rows, if the caller's are longer


@dataclass(frozen=True)
class Batch:
    """A model's arguments.

    Attributes:
        given: all of them, by name.
        rows, tokens: the batch's shape.
        text: name of the token ids, or of the embeddings given in their place.
        mask: name of the padding mask, None without one.
        padding: the padding token, if it is known and the text is token ids.
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
    """Arguments for the model, and which of their positions are not masked, (ROWS, tokens).

    Args:
        config: of the model; names its special tokens.
        agreeing: put the padding token at all masked positions and nowhere else.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(batch.rows, generator=generator)[torch.arange(ROWS) % batch.rows]
    order = torch.randperm(ROWS * batch.tokens, generator=generator)
    tokens = min(batch.tokens, max(FEWEST_TOKENS, batch.rows * batch.tokens // (SHARE * ROWS)))
    given = dict(batch.given)
    for name, value in batch.given.items():
        if batch.by_position(value):
            given[name] = value[rows].flatten(0, 1)[order[: ROWS * tokens]].unflatten(0, (ROWS, tokens))
        elif isinstance(value, Tensor) and value.dim() and value.shape[0] == batch.rows:
            given[name] = value[rows]
        elif isinstance(value, Tensor) and value.shape[:2] == (1, batch.tokens):
            given[name] = value[:, :tokens]
    unmasked = torch.ones(ROWS, tokens, dtype=torch.bool)
    if batch.mask is not None:
        unmasked = torch.cat([masks(tokens, generator) for _ in range(ROWS // 4)])
        given[batch.mask] = unmasked.to(given[batch.mask].dtype)
    if not given[batch.text].is_floating_point():
        padding = batch.padding if agreeing else None
        given[batch.text] = _text(given[batch.text], unmasked, _special(config), padding, generator)
    return given, unmasked


def masks(tokens: int, generator: torch.Generator) -> Tensor:
    """Four rows: padding on the right, on the left, at random places and both ends, nowhere. True is text."""
    at = torch.arange(tokens)
    holes = torch.rand(tokens, generator=generator) < 0.5
    holes[[0, -1]], holes[tokens // 2] = False, True
    return torch.stack([at < max(2, 2 * tokens // 3), at >= tokens // 3, holes, at >= 0])


def with_first(unmasked: Tensor) -> Tensor:
    """The unmasked positions and each row's first, which a model may pool even if it is padding (on the left)."""
    return unmasked.index_fill(1, torch.tensor(0), True)


def _special(config: Any) -> list[int]:
    """The special tokens in a configuration, whatever they are for."""
    size = getattr(config, "vocab_size", 0)
    values = (v for n, v in getattr(config, "__dict__", {}).items() if n.endswith("_token_id"))
    return sorted({v for v in values if type(v) is int and 0 <= v < size})


def _text(ids: Tensor, unmasked: Tensor, special: list[int], padding: int | None, generator: torch.Generator) -> Tensor:
    """Token ids with each special one once in every row; and, if `padding` is given, that at the masked positions."""
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
