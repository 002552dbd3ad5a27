"""Many adapters of one class at one place, computed at once: rows sorted into segments, parameters stacked.

    rows       a b a c b a  ──▶  segments  (a a a)(b b ·)(c · ·)      · is an unused slot
    stacked    A_a, A_b, A_c  as one tensor (segments, rank, in), in the dtype of the activations

A site then costs a handful of matrix products, however many adapters there are, without a loop over them. A class that
can be stacked says how in `Delta.grouped`. The loop in `core/forward/host.py` remains: it is the oracle, and it
computes what cannot be stacked and everything through which gradients flow.

Stacks belong to a route. They are cached for the next forward with the same route, as long as nothing that went into
them has changed (`core/model/parameter_changes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from inlay.core.contracts.delta import Delta, groups_itself
from inlay.core.forward.chain import Chain, Fork, Placed, changes_input, enter, leave, leaves
from inlay.core.forward.segments import Segments
from inlay.core.model.parameter_changes import Watch, versioned, watchable


@dataclass(frozen=True, eq=False)
class Group:
    """Adapters that can be stacked, at one host."""

    segments: Segments
    chain: Chain
    changes_input: bool

    def enter(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The module's changed input for these rows, in segments, and the input of each node of the chain."""
        return enter(self.chain, self.segments.take(x))

    def leave(self, seen: list[Tensor], captured: Mapping[str, Tensor], y: Tensor) -> Tensor:
        """Write the changed output of these rows into `y`, and return it."""
        fed = {path: self.segments.take(t) for path, t in captured.items()}
        return self.segments.put(y, leave(self.chain, seen, fed, self.segments.take(y), owned=True))


Groups: TypeAlias = tuple[tuple[Group, ...], frozenset[str]]


@dataclass(eq=False)
class Stacks:
    """The groups of one route at each host, and the state of the tensors that went into them."""

    names: tuple[str | None, ...]
    at: dict[tuple[str, torch.dtype], Groups] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    beside: dict[Any, Any] = field(
        default_factory=dict
    )  # what else belongs to the route (`core/prompts/stacked_prefixes.py`)

    def groups(
        self, path: str, module: nn.Module, chains: Mapping[str, Chain], dtype: torch.dtype, device: torch.device
    ) -> Groups:
        """The groups at a host, and the names of the adapters in them.

        Args:
            path, module: those of the host.
            chains: adapter → its deltas there.
        """
        key = (path, dtype)
        found = self.at.get(key)
        if found is None:
            found = self.at[key] = self._build(module, chains, dtype, device)
        return found

    def _build(
        self, module: nn.Module, chains: Mapping[str, Chain], dtype: torch.dtype, device: torch.device
    ) -> Groups:
        by_make: dict[Any, list[str]] = {}
        for name in dict.fromkeys(n for n in self.names if n is not None and n in chains):
            make = _make(chains[name])
            if make is not None:
                by_make.setdefault(make, []).append(name)
        groups = []
        for names in by_make.values():
            segments = Segments.of(self.names, names, device)
            nodes: list[Any] = []
            for position, node in enumerate(chains[names[0]]):
                assert not isinstance(node, Fork)
                site, delta = node
                stacked = type(delta).grouped([_delta(chains[n][position]) for n in segments.owners], site, dtype)
                nodes.append((site, stacked))
            if any(stacked is None or (stacked.reads_base and not versioned(module)) for _, stacked in nodes):
                continue
            groups.append(Group(segments, tuple(nodes), changes_input(chains[names[0]])))
            self.watch.add(m for n in names for _, d in leaves(chains[n]) for m in d.modules())
            if any(stacked.reads_base for _, stacked in nodes):
                self.watch.add([module])
        return tuple(groups), frozenset(n for g in groups for n in g.segments.owners)


def _make(chain: Chain) -> Any:
    """The key that two adapters' chains must share to be stacked; None if this chain cannot be stacked."""
    found = []
    for node in chain:
        if isinstance(node, Fork):
            return None
        site, delta = node
        plain = all(map(watchable, delta.modules()))
        if site.sources or delta.reads_span or not plain or not groups_itself(type(delta)):
            return None
        found.append((type(delta), site.part, site.fed_by))
    return tuple(found)


def _delta(node: Placed | Fork) -> Delta:
    assert not isinstance(node, Fork)
    return node[1]
