"""Where a method goes: resolves the user's words to sites, or raises one error that lists every word that failed.

"all-linear"            every linear layer of the numbered blocks (never the output head)
"attention", "mlp"      the linear layers of these sublayers
"norms", "biases"       every norm; every layer that has a bias
"query", "down", …      a role (`core/model/roles.py`); query, key and value also inside a fused matrix
["q_proj", "mlp.fc1"]   ends of module names; each must match
re.compile(...)         a pattern that the whole module name must match
lambda name, module: …  a predicate
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from inlay.core.errors import SelectionError, nearest, problems
from inlay.core.model import roles
from inlay.core.model.layer import Kind
from inlay.core.model.site import Site
from inlay.core.model.view import ModelView

Predicate = Callable[[str, nn.Module], bool]
Where = str | Sequence[str] | re.Pattern[str] | Predicate

ROLE_WORDS = (
    *roles.ATTENTION[:3], "attention_output", *roles.MLP, "attention_sublayer", "mlp_sublayer", "mlp_block",
    "block_output",
)  # fmt: skip
KEYWORDS = ("all-linear", "attention", "mlp", "norms", "biases")


@dataclass(frozen=True)
class Places:
    """The user's `where` and `layers`, as given.

    Attributes:
        where: None means the method's own default.
        layers: numbers of the layers to adapt; None means all.
    """

    where: Where | None = None
    layers: tuple[int, ...] | None = None

    @staticmethod
    def of(where: Where | None, layers: Sequence[int] | None) -> Places:
        frozen = tuple(where) if isinstance(where, (list, tuple)) else where
        return Places(frozen, None if layers is None else tuple(layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain data. A predicate cannot be stored; the caller replaces it with the sites it chose."""
        where: Any = self.where
        if isinstance(where, re.Pattern):
            where = {"regex": where.pattern}
        elif isinstance(where, tuple):
            where = list(where)
        return {"where": where, "layers": None if self.layers is None else list(self.layers)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Places:
        where = values.get("where")
        if isinstance(where, dict):
            where = re.compile(where["regex"])
        return Places.of(where, values.get("layers"))


def select(view: ModelView, places: Places, default: Where, kinds: tuple[Kind, ...]) -> list[Site]:
    """The sites that `places` names, in the order of the model, each once.

    Args:
        default: the method's own places, for when the user gives none.
        kinds: the kinds of layer the method can adapt.

    Raises:
        SelectionError: an entry matches nothing, or only layers of other kinds; a layer number does not exist.
    """
    where = default if places.where is None else places.where
    entries = where if isinstance(where, (list, tuple)) else (where,)
    found: dict[str, Site] = {}
    wrong = []
    for entry in entries:
        sites, miss = _resolve(view, entry, kinds)
        # A default lists the places of all architectures; in a user's list each word must match.
        if miss and places.where is not None:
            wrong.append(miss)
        found.update((s.key, s) for s in sites)
    chosen = [s for s in found.values() if places.layers is None or _in_layers(s, places.layers)]
    if places.layers is not None and not wrong:
        wrong += _missing_layers(list(found.values()), places.layers)
    if not chosen and not wrong:
        wrong.append(f"{_text(where)} matches no {' or '.join(kinds)} layer of this model")
    if wrong:
        raise SelectionError(problems("where", wrong))
    order = {path: i for i, path in enumerate(view.modules)}
    return sorted(chosen, key=lambda s: (order[s.path], s.part.start if s.part else 0))


def _resolve(view: ModelView, entry: Any, kinds: tuple[Kind, ...]) -> tuple[list[Site], str | None]:
    """The sites of one entry; if there are none, what is wrong."""
    if isinstance(entry, re.Pattern):
        return _filtered(view, lambda path, _: entry.fullmatch(path) is not None, kinds, _text(entry))
    if callable(entry):
        return _filtered(view, entry, kinds, "the predicate")
    if not isinstance(entry, str):
        return [], f"{entry!r} is neither a name, a pattern nor a predicate"
    if entry in KEYWORDS:
        sites = [s for s in view.layers.values() if s.kind in kinds and _keyword(view, entry, s)]
        return sites, None if sites else f"{entry!r} matches no {' or '.join(kinds)} layer of this model"
    suffix, _, part = entry.partition(":")
    matching = {first for p, first in view.names.items() if p == suffix or p.endswith("." + suffix)}
    if matching and part:
        sites = [s for role in ("query", "key", "value") for s in view.by_role(role) if s.part and s.part.name == part]
        sites = [s for s in sites if s.path in matching]
        return sites, None if sites else f"{entry!r}: these layers have no part {part!r}"
    if matching:
        return _filtered(view, lambda path, _: path in matching, kinds, repr(entry))
    if entry in ROLE_WORDS:
        sites = [s for s in view.by_role(entry) if s.kind in kinds]
        return sites, None if sites else f"{entry!r}: this model has no such layer"
    known = {p.rpartition(".")[2] for p, s in view.layers.items() if s.kind in kinds and view.in_blocks(p)}
    return [], f"{entry!r} matches no module{nearest(entry, known | set(KEYWORDS))}"


def _keyword(view: ModelView, word: str, site: Site) -> bool:
    if word == "norms":
        return site.kind == "norm"
    if word == "biases":
        return site.bias
    if not view.in_blocks(site.path) or site.kind != "linear":
        return False
    if word == "all-linear":
        return True
    return site.role in (roles.ATTENTION if word == "attention" else roles.MLP)


def _filtered(view: ModelView, wanted: Predicate, kinds: tuple[Kind, ...], words: str) -> tuple[list[Site], str | None]:
    hits = {p: m for p, m in view.modules.items() if p and wanted(p, m)}
    sites = [view.layers[p] for p in hits if p in view.layers and view.layers[p].kind in kinds]
    if sites:
        return sites, None
    if hits:
        types = ", ".join(sorted({type(m).__name__ for m in hits.values()}))
        return [], f"{words} matches only {types}; this method adapts {' or '.join(kinds)} layers"
    return [], f"{words} matches no module"


def _in_layers(site: Site, layers: Sequence[int]) -> bool:
    layer = roles.layer_of(site.path)
    return layer is not None and layer[1] in layers


def _missing_layers(sites: list[Site], layers: Sequence[int]) -> list[str]:
    there = {layer[1] for s in sites if (layer := roles.layer_of(s.path)) is not None}
    absent = sorted(set(layers) - there)
    if not absent:
        return []
    span = f"{min(there)} to {max(there)}" if there else "none"
    return [f"layers {', '.join(map(str, absent))} have no matching site (layers that have one: {span})"]


def _text(where: Any) -> str:
    return f"pattern {where.pattern!r}" if isinstance(where, re.Pattern) else repr(where)
