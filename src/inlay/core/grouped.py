"""Many adapters of one class at one place, computed as one: the batch in segments, parameters stacked.

    rows       a b a c b a  ──▶  segments  (a a a)(b b ·)(c · ·)      · is a slot that nobody reads
    stacked    A_a, A_b, A_c  as one tensor (segments, rank, in), in the dtype of the activations

A site then costs a handful of products whatever the number of adapters, without a loop over them. What a class
can do so it says itself (`Delta.grouped`); the loop of `core/host.py` stays as the oracle, for what cannot be
stacked, and wherever gradients flow.

Stacks belong to a route and are kept for the next forward with the same one, as long as everything that went into
them is unchanged (`core/watch.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.chain import Chain, Fork, Placed, changes_input, enter, leave, leaves
from inlay.core.delta import Delta, says_itself
from inlay.core.site import Site
from inlay.core.watch import Watch, versioned, watchable

if TYPE_CHECKING:
    from inlay.core.call import Call
    from inlay.core.host import Host
    from inlay.core.route import Route

KEPT_PROMPTS = 128
KEPT_ROUTES = 4  # a server alternates between few: the batch it decodes, the ones it prefills


class Grouped:
    """Stacked deltas, one for each segment. Abstract. `pre` and `post` are a `Delta`'s, without gradients.

    Class variables:
        reads_base: whether the stacks hold something computed from the layer's own parameters.
    """

    reads_base: ClassVar[bool] = False

    def pre(self, x: Tensor) -> Tensor:
        """(segments, tokens, in) → the same shape; `x` is not written."""
        return x

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """(segments, tokens, in), (segments, tokens, out) → (segments, tokens, out); `y` may be written."""
        return y

    post_into = post


def groups_itself(kind: type[Delta]) -> bool:
    """Whether a class says how it is grouped for the very `pre` and `post` that it has."""
    return says_itself(kind, "grouped", "pre", "post")


@dataclass(frozen=True, eq=False)
class Segments:
    """Which rows of a batch go where.

    Attributes:
        owners: the adapter of each segment.
        width: slots a segment.
        slots: the row of each slot, or None where these are the batch's rows in order.
        rows: the rows that are covered, and (`back`) the slot of each; None where every slot is one's.
    """

    owners: tuple[str, ...]
    width: int
    slots: Tensor | None
    rows: Tensor
    back: Tensor | None
    batch: int

    @staticmethod
    def of(names: Sequence[str | None], among: Iterable[str], device: torch.device) -> Segments:
        """The rows of the adapters in `among`."""
        rows = {name: [r for r, n in enumerate(names) if n == name] for name in among}
        width = _width([len(r) for r in rows.values()])
        owners: list[str] = []
        slots: list[int] = []
        taken: list[int] = []
        back: list[int] = []
        for name, mine in rows.items():
            for start in range(0, len(mine), width):
                part = mine[start : start + width]
                back += range(len(slots), len(slots) + len(part))
                slots += [*part, *[part[-1]] * (width - len(part))]
                taken += part
                owners.append(name)
        whole = slots == list(range(len(names)))
        made = [torch.tensor(v, device=device) for v in (slots, taken, back)]
        return Segments(
            tuple(owners), width, None if whole else made[0], made[1], None if slots == taken else made[2], len(names)
        )

    def take(self, values: Tensor) -> Tensor:
        """A batch's rows as (segments, tokens, features)."""
        byrow = values.reshape(self.batch, -1, values.shape[-1])
        picked = byrow if self.slots is None else byrow.index_select(0, self.slots)
        return picked.reshape(len(self.owners), -1, values.shape[-1])

    def put(self, into: Tensor, values: Tensor) -> Tensor:
        """`into`, which is written, with the covered rows replaced."""
        if self.slots is None:
            return values.view(into.shape)
        byrow = values.reshape(len(self.owners) * self.width, -1, values.shape[-1])
        picked = byrow if self.back is None else byrow.index_select(0, self.back)
        into.view(self.batch, -1, into.shape[-1]).index_copy_(0, self.rows, picked)
        return into


def _width(counts: Sequence[int]) -> int:
    """Slots a segment: a trade of slots that are computed for nothing against parameters that are read twice."""
    return min(sorted(set(counts)) or [1], key=lambda w: sum(-(-c // w) for c in counts) * (w + 1))


@dataclass(frozen=True, eq=False)
class Group:
    """Adapters of one make at one host."""

    segments: Segments
    chain: Chain
    changes_input: bool

    def enter(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What enters the module for these rows, in segments, and what each node of the chain saw."""
        return enter(self.chain, self.segments.take(x))

    def leave(self, seen: list[Tensor], captured: Mapping[str, Tensor], y: Tensor) -> Tensor:
        """`y`, which is written, with these rows as they leave the module."""
        fed = {path: self.segments.take(t) for path, t in captured.items()}
        return self.segments.put(y, leave(self.chain, seen, fed, self.segments.take(y), owned=True))


@dataclass(eq=False)
class Stacks:
    """The groups of one route at each host, and the state of the tensors that went into them."""

    names: tuple[str | None, ...]
    at: dict[tuple[str, torch.dtype], tuple[tuple[Group, ...], frozenset[str]]] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    beside: dict[Any, Any] = field(default_factory=dict)  # what else belongs to the route (`core/together.py`)

    def groups(self, host: Host, dtype: torch.dtype, device: torch.device) -> tuple[tuple[Group, ...], frozenset[str]]:
        """The groups at a host, and the adapters that are in one."""
        key = (host.path, dtype)
        found = self.at.get(key)
        if found is None:
            found = self._build(host, dtype, device)
            self.at[key] = found
        return found

    def _build(self, host: Host, dtype: torch.dtype, device: torch.device) -> tuple[tuple[Group, ...], frozenset[str]]:
        by_make: dict[Any, list[str]] = {}
        for name in dict.fromkeys(n for n in self.names if n in host.deltas):
            make = _make(host.deltas[name])
            if make is not None:
                by_make.setdefault(make, []).append(name)
        groups = []
        for names in by_make.values():
            segments = Segments.of(self.names, names, device)
            nodes: list[Any] = []
            for position, node in enumerate(host.deltas[names[0]]):
                assert not isinstance(node, Fork)
                site, delta = node
                stacked = type(delta).grouped([_delta(host.deltas[n][position]) for n in segments.owners], site, dtype)
                nodes.append((site, stacked))
            if any(stacked is None or (stacked.reads_base and not versioned(host.module)) for _, stacked in nodes):
                continue
            groups.append(Group(segments, tuple(nodes), changes_input(host.deltas[names[0]])))
            self.watch.add(m for n in names for _, d in leaves(host.deltas[n]) for m in d.modules())
            if any(stacked.reads_base for _, stacked in nodes):
                self.watch.add([host.module])
        return tuple(groups), frozenset(n for g in groups for n in g.segments.owners)


class Kept:
    """What forwards without gradients leave for the next ones: the last few routes' stacks, computed prompts."""

    def __init__(self) -> None:
        self.routes: dict[tuple[str | None, ...], Stacks] = {}
        self.prompted: dict[str, tuple[Watch, Call]] = {}
        self.base = Watch()

    def of(self, route: Route) -> Stacks:
        """The stacks of a route, as they are or, where some parameter has changed, empty."""
        found = self.routes.pop(route.names, None)
        if found is None or not found.watch.unchanged():
            found = Stacks(route.names)
        self.routes[route.names] = found  # the last used one last
        for old in list(self.routes)[:-KEPT_ROUTES]:
            self.routes.pop(old, None)
        return found

    def prompts(self, name: str) -> Call | None:
        """An adapter's prompts from an earlier forward, if neither it nor the base has changed since."""
        held = self.prompted.pop(name, None)
        if held is None or not held[0].unchanged():
            return None
        if not self.base.unchanged():  # prompts may be prefilled through it, or projected by it
            self.prompted, self.base = {}, Watch()
            return None
        self.prompted[name] = held
        return held[1]

    def keep(self, name: str, prompts: Call, modules: Iterable[nn.Module], base: Iterable[nn.Module]) -> None:
        """Keep prompts that were computed from these modules, where it can be told whether they change."""
        own, below = [m for module in modules for m in module.modules()], list(base)
        if not all(map(watchable, (*own, *below))):
            return
        if not self.base.modules:
            self.base.add(below)
        watch = Watch()
        watch.add(own)
        self.prompted[name] = watch, prompts
        for old in list(self.prompted)[:-KEPT_PROMPTS]:
            self.prompted.pop(old, None)

    def clear(self) -> None:
        """Forget everything."""
        self.routes, self.prompted, self.base = {}, {}, Watch()

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _make(chain: Chain) -> Any:
    """What two adapters' chains must have in common to be stacked, or None where this one cannot be."""
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
