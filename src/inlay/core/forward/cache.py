"""The cache of forwards without gradients: valid as long as nothing it was computed from has changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from inlay.core.forward.batched_adapters import Stacks
from inlay.core.forward.call import Call
from inlay.core.forward.route import Route
from inlay.core.model.parameter_changes import Watch, watchable

KEPT_PROMPTS = 128
KEPT_ROUTES = 4  # a server alternates between a few: the batch it decodes, those it prefills


class Kept:
    """The cache of forwards without gradients: the stacks of the last few routes, and computed prompts."""

    def __init__(self) -> None:
        self.routes: dict[tuple[str | None, ...], Stacks] = {}
        self.prompted: dict[str, tuple[Watch, Call]] = {}
        self.base = Watch()

    def of(self, route: Route) -> Stacks:
        """The stacks of a route; empty if they are new or some parameter has changed."""
        found = self.routes.pop(route.names, None)
        if found is None or not found.watch.unchanged():
            found = Stacks(route.names)
        self.routes[route.names] = found  # the most recently used one stands last
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
        """Keep prompts that were computed from these modules, if changes to the modules can be noticed."""
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
        """Empty the cache."""
        self.routes, self.prompted, self.base = {}, {}, Watch()

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()
