"""The registry of one model's adapters, and which of them is active in this context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.shared import shared_in
from inlay.core.errors import AdapterNameError, RouteError, UnsupportedError, nearest
from inlay.core.forward.cache import Kept
from inlay.core.forward.call import Call
from inlay.core.forward.route import Route
from inlay.core.forward.scope import Scoped
from inlay.core.upstream import COMPILED_FROM


@dataclass
class Merged:
    """A merge in effect: the adapter's name, and how to undo it."""

    name: str
    undo: list[Callable[[], None]]  # partial calls, so that a copied model undoes its own merge


@dataclass(eq=False)
class Roster:
    """The state that every forward of one model reads; kept on the model's root.

    Attributes:
        adapters: by name, in the order of attaching.
        active: the adapter used outside of `use` blocks; None is the base.
        merged: the merge in effect, if any.
        selected: the route of the innermost `use` block in this context.
        call: the forward that is running in this context.
        kept: cache of forwards without gradients: prompts, and the stacks of mixed batches.
        encoder: whether virtual tokens join an encoder's sequence instead of a decoder's cache.
    """

    model: nn.Module
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    merged: Merged | None = None
    selected: Scoped[Route] = field(default_factory=Scoped)
    call: Scoped[Call] = field(default_factory=Scoped)
    kept: Kept = field(default_factory=Kept)
    encoder: bool = False

    def current(self) -> Route:
        """The route in force in this context."""
        call = self.call.get()
        if call is not None:
            return call.route
        selected = self.selected.get()
        if selected is not None:
            return selected
        return Route((self.active,))

    def bind(self, route: Route, call: Call | None) -> AbstractContextManager[object]:
        """Put a route and a call in force, for example those under which a checkpointed layer first ran."""
        stack = ExitStack()
        stack.enter_context(self.selected.bind(route))
        stack.enter_context(self.call.bind(call))
        return stack

    def only(self, name: str | None) -> AbstractContextManager[object]:
        """Put a single adapter in force for some of a mixed batch's rows."""
        call = self.call.get()
        route = Route((name,))
        return self.bind(route, None if call is None else replace(call, route=route))

    def require(self, name: str) -> Adapter:
        """The adapter of that name.

        Raises:
            AdapterNameError: there is none. The base is never used instead.
        """
        if name not in self.adapters:
            there = ", ".join(sorted(self.adapters)) or "none"
            raise AdapterNameError(f"no adapter {name!r} on this model (there: {there}){nearest(name, self.adapters)}")
        return self.adapters[name]

    def check(self, choice: str | None | Sequence[str | None]) -> Route:
        """Resolve the argument of `use`, or raise one error with everything that is wrong with it."""
        route = Route.of(choice)
        for name in route.used:
            self.require(name)
        self.check_merged(route)
        if not route.single:
            whole = [n for n in route.used if self.adapters[n].changes_base]
            if whole:
                raise RouteError(
                    f"{', '.join(map(repr, whole))} changes the base's own weights ("
                    f"{', '.join(sorted({self.adapters[n].method.name for n in whole}))}), which all rows share, "
                    "so it cannot be mixed with other adapters in one batch; run its rows in a batch of their own"
                )
        return route

    def check_merged(self, route: Route) -> None:
        """Raise if another adapter is asked for while one is merged."""
        if self.merged is not None and set(route.names) != {self.merged.name}:
            raise RouteError(
                f"adapter {self.merged.name!r} is merged into the base, so no other can be used; call unmerge() first"
            )

    def has_prompt(self, name: str | None) -> bool:
        return name is not None and bool(self.require(name).prompts)

    def reads_span(self, name: str | None) -> bool:
        """Whether some delta of an adapter acts at positions of the prompt (`core/prompts/span.py`)."""
        return name is not None and self.require(name).reads_span


def held_by_others(model: nn.Module, adapter: Adapter) -> list[nn.Parameter]:
    """Parameters of an adapter that attached adapters hold already: tasks may share the same object."""
    if not any(True for module in adapter.modules() for _ in shared_in(module)):
        return []  # so the cost of attaching does not grow with the number of adapters
    roster = find_roster(model)
    others = () if roster is None else (a for a in roster.adapters.values() if a is not adapter)
    held = {id(p) for other in others for p in other.parameters()}
    return [p for p in adapter.parameters() if id(p) in held]


def roster_of(model: nn.Module) -> Roster:
    """The roster of an attached model, even if it is compiled or wrapped for data parallelism.

    Raises:
        UnsupportedError: nothing is attached.
    """
    found = find_roster(model)
    if found is None:
        raise UnsupportedError(
            "this model has no adapters: call inlay.attach(model, method) or inlay.load(model, folder)"
        )
    return found


def find_roster(model: nn.Module) -> Roster | None:
    seen: Any = model
    while seen is not None:
        roster = getattr(seen, "__dict__", {}).get("_inlay_roster")
        if isinstance(roster, Roster):
            return roster
        modules = getattr(seen, "_modules", {})
        seen = modules.get(COMPILED_FROM) or (modules.get("module") if len(modules) == 1 else None)
    return None


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Within the block, the base alone in eval mode, whatever is attached; afterwards the modes are restored."""
    modes = [(m, m.training) for m in model.modules()]
    roster = find_roster(model)
    model.eval()
    try:
        if roster is None:
            yield
        else:
            with roster.bind(Route((None,)), None):
                yield
    finally:
        for module, training in modes:
            module.training = training
