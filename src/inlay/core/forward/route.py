"""Which rows of a batch go through which adapter.

`use` binds a choice to the calling context; a `Route` is that choice resolved: one name for all rows, or one a row.
Layers receive tensors of several shapes, so the row of an entry is found from the leading dimension:

    (rows, tokens, features)     row = index                       most models
    (rows × tokens, features)    row = index // tokens             models that flatten before a linear (OPT)
    (rows × beams, ...)          row = index // beams              beam search and several samples a prompt

Any other size raises an error: a wrong guess would serve one user's adapter to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from inlay.core.errors import RouteError


@dataclass(frozen=True)
class Route:
    """A resolved choice of adapters.

    Attributes:
        names: a single entry for all rows, or one entry a row; None stands for the base.
        per_row: whether `names` has one entry a row.
        expand: copies that generation makes of each row (beams, samples); 1 elsewhere.
        single: whether all rows use one adapter (or the base).
        used: the adapters that some row uses, in order of first appearance.
    """

    names: tuple[str | None, ...]
    per_row: bool = False
    expand: int = 1
    single: bool = field(init=False, compare=False)
    used: tuple[str, ...] = field(init=False, compare=False)

    @staticmethod
    def of(choice: str | None | Sequence[str | None]) -> Route:
        if choice is None or isinstance(choice, str):
            return Route((choice,))
        if len(choice) == 0:
            raise RouteError("use(model, []) names no row: give one adapter name (or None) for each row of the batch")
        return Route(tuple(choice), per_row=True)

    def __post_init__(self) -> None:
        # Needed at every layer of every forward, so computed once.
        object.__setattr__(self, "single", len(set(self.names)) == 1)
        object.__setattr__(self, "used", tuple(dict.fromkeys(n for n in self.names if n is not None)))

    def check_rows(self, rows: int) -> None:
        """Raise unless this route fits a batch of `rows`."""
        if self.per_row and rows not in (len(self.names), len(self.names) * self.expand):
            raise RouteError(
                f"use() names {len(self.names)} rows but the batch has {rows}; give one adapter name (or None) a row"
            )

    def names_for(self, rows: int) -> tuple[str | None, ...]:
        """The adapter of each of `rows` rows, including the copies that generation made."""
        self.check_rows(rows)
        if not self.per_row:
            return self.names * rows
        return tuple(n for n in self.names for _ in range(rows // len(self.names)))

    def index(self, name: str | None, like: Tensor, *, tokens: int | None = None, pooled: bool = True) -> Tensor:
        """The indices along `like`'s leading dimension that belong to `name`; other arguments as in `repeats`."""
        repeat = self.repeats(like, tokens=tokens, pooled=pooled)
        owned = tuple(r for r, n in enumerate(self.names) if n == name)
        make = _row_index.__wrapped__ if torch.compiler.is_compiling() else _row_index
        return make(owned, repeat, like.device)

    def repeats(self, like: Tensor, *, tokens: int | None = None, pooled: bool = True) -> int:
        """How many entries along `like`'s leading dimension each name stands for.

        Args:
            tokens: tokens per row of this call, if known; rows that a model flattened can only be recognised by it.
            pooled: whether a two-dimensional tensor may hold one vector a row, as behind a pooler.

        Raises:
            RouteError: the leading dimension does not fit a batch of this route.
        """
        count, rows = like.shape[0], len(self.names)
        whole = (rows, rows * self.expand) if like.dim() != 2 or pooled else ()
        flat = tokens is not None and like.dim() == 2 and count in (rows * tokens, rows * self.expand * tokens)
        if count not in whole and not flat:
            raise RouteError(
                f"a layer received {tuple(like.shape)} while use() names {rows} rows: this model rearranges rows "
                "there, so a mixed batch cannot be routed exactly; run the adapters one after another, or choose "
                "other places"
            )
        return count // rows


@lru_cache(maxsize=256)
def _row_index(rows: tuple[int, ...], repeat: int, device: torch.device) -> Tensor:
    return torch.tensor([r * repeat + i for r in rows for i in range(repeat)], device=device)
