"""A host: one module of the base, and everything adapters do to it.

The module keeps its place, its parameters and their names; only its class is exchanged for a subclass whose
`forward` asks the host (`core/class_exchange.py`). Deltas are stored below the module's child `inlay`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.contracts.adapter import Held
from inlay.core.contracts.subset import Difference
from inlay.core.errors import RouteError, UnsupportedError
from inlay.core.forward import wrappers
from inlay.core.forward.active_adapters import Roster
from inlay.core.forward.batched_adapters import Group
from inlay.core.forward.chain import Chain, changes_input, enter, leave, leaves, with_layer
from inlay.core.forward.route import Route
from inlay.core.model.layer import shape_of

Forward = Callable[..., Any]
LINEAR = nn.Linear.forward
PASSING = ("captured", "entered", "originals")  # attributes that only hold something while a forward runs


class Storage(nn.ModuleDict):
    """Adapter name → its trained modules at one host. Recognised by type, never by name."""

    inlay_storage = True

    def __setitem__(self, key: str, module: nn.Module) -> None:
        """Allow any name: torch refuses those of a module's own methods (``half``, ``train``)."""
        self._modules[key] = module


class Host:
    """What adapters do at one module.

    Attributes:
        deltas: adapter → the chain of its deltas here.
        differences: adapter → parameter name → the difference that is added to it.
        copies: adapter → parameter name → the adapter's own copy.
        feeds: hosts whose deltas read this module's input as their ``x``.
        captured: thread → path of a module that feeds this one → its input.
        entered: thread → input of this attention module, while it decides how much each prompt pair counts.
        features: what the module's subclass does (`core/class_exchange.py`).
        wrappers: the wrappers around the forward with their names, innermost first (`core/forward/wrappers.py`).
        original_forward: the forward that was set on the instance before it became a host, if any.
        originals: threads in which that forward is running.
        encoder: whether the module's positions are those of an encoder's sequence.
        by_row: whether the module's input is a batch of rows; it is not for experts and relative position tables.
        pooled: whether a two-dimensional input may hold one vector a row.
        owns: whether the module's output is a new tensor: a layer's is, that of a dropout in evaluation is not.
    """

    def __init__(self, roster: Roster, path: str, module: nn.Module) -> None:
        self.roster, self.path, self.module = roster, path, module
        self.deltas: dict[str, Chain] = {}
        self.differences: dict[str, dict[str, Difference]] = {}
        self.copies: dict[str, dict[str, Held]] = {}
        self.feeds: list[Host] = []
        self.original_class = type(module)
        self.original_forward: Forward | None = module.__dict__.get("forward")
        self.captured: dict[int, dict[str, Tensor]] = {}
        self.entered: dict[int, Tensor] = {}
        self.features: frozenset[str] = frozenset()
        self.wrappers: tuple[tuple[str, Forward], ...] = ()
        self.originals: set[int] = set()
        self.encoder = False
        self.by_row, self.pooled = True, True
        self.owns = shape_of(module) is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> Host:
        import copy

        new = object.__new__(Host)
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = type(value)() if name in PASSING else copy.deepcopy(value, memo)
        return new

    # -- parameters ---------------------------------------------------------------------------

    @property
    def replaced(self) -> frozenset[str]:
        """Names of the parameters that some adapter changes or replaces."""
        names = [set(d) for owner in (self.differences, self.copies) for d in owner.values()]
        return frozenset(set().union(*names)) if names else frozenset()

    def parameter(self, name: str) -> Tensor | None:
        """The parameter `name` that the module computes with: the base's, or the active adapter's."""
        value = self.module._parameters[name]
        route = self.roster.current()
        adapter = route.names[0] if route.single else None
        if value is None or adapter is None or self.roster.merged is not None:
            return value
        copied = self.copies.get(adapter, {}).get(name)
        if copied is not None:
            return copied.value.to(value.dtype)
        difference = self.differences.get(adapter, {}).get(name)
        return value if difference is None else difference.apply_to(value)

    # -- the forward --------------------------------------------------------------------------

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """The module's forward under the current route: the wrapper ``forward``."""
        route = self.roster.current()
        if self.roster.merged is not None:
            self.roster.check_merged(route)
            return forward(*args, **kwargs)
        for host in self.feeds:
            if any(name in host.deltas for name in route.used):  # otherwise nobody would remove it again
                host.captured.setdefault(thread(), {})[self.path] = _first(args, kwargs)
        if not route.single:
            return self._mixed(route, forward, args, kwargs)
        name = route.names[0]
        deltas = self.deltas.get(name, ()) if name is not None else ()
        if not deltas:
            return forward(*args, **kwargs)
        x, seen = enter(deltas, _first(args, kwargs))
        made = with_layer(deltas, x) if wrappers.enabled("fused-update") and self._runs_linear() else None
        if made is not None:
            self.captured.pop(thread(), None)
            return made
        new_args, new_kwargs = _with_first(args, kwargs, x)
        y = forward(*new_args, **new_kwargs)
        captured = self.captured.pop(thread(), {})
        return _on_tensor(y, lambda t: leave(deltas, seen, captured, t, owned=self.owns))

    def call_original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was set on the instance before; it may call the module's own in turn."""
        assert self.original_forward is not None
        self.originals.add(thread())
        try:
            return self.original_forward(*args, **kwargs)
        finally:
            self.originals.discard(thread())

    def inside(self) -> bool:
        """Whether `call_original` is running in this thread."""
        return bool(self.originals) and thread() in self.originals

    def _runs_linear(self) -> bool:
        """Whether the module's forward runs exactly the code of a linear layer."""
        return (
            self.original_class.forward is LINEAR
            and self.original_forward is None
            and self.features <= wrappers.AROUND_ADAPTERS
        )

    def _mixed(self, route: Route, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A mixed batch: one call of the base; before and after it, each adapter's rows separately."""
        names = [n for n in route.used if n in self.deltas]
        copied = any(n in self.copies for n in route.used)
        if not names and not copied:
            return forward(*args, **kwargs)
        x = _first(args, kwargs)
        groups, grouped = self._groups(route, x, copied)
        left = [n for n in names if n not in grouped]
        rows = {n: self._rows(route, n, x) for n in dict.fromkeys(route.names) if copied or n in left}
        entering = x
        seen: dict[str, list[Tensor]] = {}
        for name in left:
            own, seen[name] = enter(self.deltas[name], x[rows[name]])
            if changes_input(self.deltas[name]):
                entering = _put_rows(entering, rows[name], own)
        together = []
        for group in groups:
            ours, inside = group.enter(x)
            together.append(inside)
            if group.changes_input:
                entering = group.segments.put(entering.clone() if entering is x else entering, ours)
        if copied:
            y = self._split(route, forward, args, kwargs, entering, rows)
        else:
            new_args, new_kwargs = _with_first(args, kwargs, entering)
            y = forward(*new_args, **new_kwargs)
        if not names:
            return y
        captured = self.captured.pop(thread(), {})

        def post(t: Tensor) -> Tensor:
            out = t if self.owns and grouped and t.is_contiguous() else t.clone(memory_format=torch.contiguous_format)
            for name in left:
                at = rows[name] if t.shape[0] == x.shape[0] else self._rows(route, name, t)
                fed = {p: t[self._rows(route, name, t)] for p, t in captured.items()}
                with self._alone(name, rows[name]):
                    out[at] = leave(self.deltas[name], seen[name], fed, t[at], owned=True)
            for group, inside in zip(groups, together, strict=True):
                for value in (t, *captured.values()):
                    self._repeats(route, value)
                out = group.leave(inside, captured, out)
            return out

        return _on_tensor(y, post)

    def _groups(self, route: Route, x: Any, copied: bool) -> tuple[tuple[Group, ...], frozenset[str]]:
        """The groups of adapters here that are computed at once, and the names of these adapters."""
        call = self.roster.call.get()
        if call is None or call.stacks is None or copied or torch.is_autocast_enabled(x.device.type):
            return (), frozenset()
        if not x.is_floating_point() or torch.is_grad_enabled():
            return (), frozenset()
        self._repeats(route, x)
        return call.stacks.groups(self.path, self.module, self.deltas, x.dtype, x.device)

    def _alone(self, name: str, rows: Tensor) -> AbstractContextManager[object]:
        """While one adapter's rows are computed separately, let the call give the spans of these rows only."""
        call = self.roster.call.get()
        if call is None or call.span is None or not any(d.reads_span for _, d in leaves(self.deltas[name])):
            return nullcontext()
        return self.roster.bind(call.route, replace(call, span=call.span[rows]))

    def _rows(self, route: Route, name: str | None, like: Tensor) -> Tensor:
        """The indices of an adapter's rows in an input or output of this module."""
        return route.index(name, like, tokens=self._tokens(), pooled=self.pooled)

    def _repeats(self, route: Route, like: Tensor) -> int:
        """How many leading entries of an input or output of this module belong to each row."""
        return route.repeats(like, tokens=self._tokens(), pooled=self.pooled)

    def _tokens(self) -> int | None:
        """Tokens per row in this call.

        Raises:
            RouteError: the input of this module is not a batch of rows.
        """
        if not self.by_row:
            raise RouteError(
                f"the input of {self.path} is not a batch of rows, so it cannot serve several adapters in one batch; "
                "run them one after another, or choose other places"
            )
        call = self.roster.call.get()
        return None if call is None else call.tokens

    def _split(
        self, route: Route, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor,
        rows: dict[str | None, Tensor],
    ) -> Tensor:  # fmt: skip
        """A layer of which adapters own copies: each adapter's rows go through its own copy."""
        parts = []
        for name, index in rows.items():
            new_args, new_kwargs = _with_first(args, kwargs, x[index])
            with self.roster.only(name):
                y = forward(*new_args, **new_kwargs)
            if not isinstance(y, Tensor):
                raise UnsupportedError(
                    f"{self.path} returns a {type(y).__name__}, so copies of it cannot share a batch; run the "
                    "adapters one after another"
                )
            parts.append(y)
        shapes = {tuple(p.shape[1:]) for p in parts}
        if len(shapes) > 1:
            raise UnsupportedError(
                f"the adapters' copies of {self.path} return outputs of different shapes {sorted(shapes)}; "
                "run them one after another"
            )
        order = torch.argsort(torch.cat(list(rows.values())))
        return torch.cat(parts)[order]


def thread() -> int:
    """The key under which this thread's captured inputs are kept."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's input: its first argument, positional or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


def _with_first(args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


def _put_rows(into: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    out = into.clone()
    out[rows] = values.to(into.dtype)
    return out


def _on_tensor(y: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change a module's output, or the first entry if it is a tuple."""
    if isinstance(y, tuple):
        return (change(y[0]), *y[1:])
    return change(y)


wrappers.register("forward", Host.run)
