"""Shared by methods with a rank and an alpha: values that differ by site (`core/contracts/site_pattern.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from inlay.authoring import DeltaPiece, Method, Pattern, Piece, SelectionError, Site, frozen, problems, unused, value_at


class Ranked(Protocol):
    """The fields that these functions read."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def rank_pattern(self) -> Mapping[str, int] | Pattern[int]: ...
    @property
    def alpha_pattern(self) -> Mapping[str, float] | Pattern[float]: ...


def settle(method: Ranked) -> None:
    """Turn a frozen method's patterns into tuples and check its ranks; for `__post_init__`."""
    for name in ("rank_pattern", "alpha_pattern"):
        object.__setattr__(method, name, frozen(getattr(method, name)))
    assert isinstance(method, Method)
    method.require(
        (method.rank >= 1, f"rank is {method.rank}, expected at least 1"),
        (all(r >= 1 for _, r in frozen(method.rank_pattern)), "every rank of rank_pattern must be at least 1"),
    )


def rank_and_alpha(method: Ranked, site: Site) -> tuple[int, float]:
    """The rank and alpha at `site`."""
    rank = value_at(site.key, frozen(method.rank_pattern), method.rank)
    return rank, value_at(site.key, frozen(method.alpha_pattern), method.alpha)


def check_used(method: Ranked, pieces: Sequence[Piece]) -> None:
    """Raise if an entry of a pattern fits none of the sites, which is a mistyped name."""
    keys = [piece.key for piece in pieces if isinstance(piece, DeltaPiece)]
    wrong = [
        f"rank_pattern: {end!r} fits none of the chosen sites" for end in unused(frozen(method.rank_pattern), keys)
    ]
    wrong += [
        f"alpha_pattern: {end!r} fits none of the chosen sites" for end in unused(frozen(method.alpha_pattern), keys)
    ]
    if wrong:
        assert isinstance(method, Method)
        raise SelectionError(problems(f"method {method.name!r}", wrong))
