"""Values that differ from site to site: ``{"layers.3.self_attn.q_proj": 16, "down_proj": 4}``.

A pattern's key fits every site whose key ends with it. The longest one that fits decides, so an entry for all `q_proj`
and another for one of them can be given at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

Number = TypeVar("Number", int, float)
Pattern = tuple[tuple[str, Number], ...]


def frozen(pattern: Mapping[str, Number] | Iterable[tuple[str, Number]]) -> Pattern[Number]:
    """A mapping as sorted pairs, which a frozen method can hold and a file can store."""
    pairs = pattern.items() if isinstance(pattern, Mapping) else pattern
    return tuple(sorted((str(key), value) for key, value in pairs))


def value_at(key: str, pattern: Pattern[Number], default: Number) -> Number:
    """The pattern's value at the site `key`, or `default`."""
    fitting = [(len(end), value) for end, value in pattern if key == end or key.endswith("." + end)]
    return max(fitting)[1] if fitting else default


def pinned(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """The shortest pattern that gives exactly these values at these sites, even if one key ends with another."""
    different = {key for key, value in values.items() if value != default}
    ends = tuple(f".{key}" for key in different)
    return {key: value for key, value in values.items() if key in different or key.endswith(ends)}


def unused(pattern: Pattern[Number], keys: Iterable[str]) -> list[str]:
    """The pattern's keys that fit no site, which are mistakes."""
    there = list(keys)
    return [end for end, _ in pattern if not any(k == end or k.endswith("." + end) for k in there)]
