"""Which modules of a model can skip positions: found and proved on a copy.

The copy shares the base's frozen parameters. Its trained ones are its own and moved at random, because a head or a gate
that starts at zero would hide a reader. It runs in a context of its own, so the trial leaves no trace in the model, in
the random state or in anything bound to the caller's context. Its batches (`probe.py`) are rearranged rows of the
caller's.

    look    one backward pass from all outputs: at which positions of a module's output do they depend on it? At the
            first of each row only, or at no masked one (the first always counts as read)? And each module must give
            for some positions alone what it gives for them among all.
    prove   on another batch. With garbage at the skipped positions of all these modules, with zeros, and as computed,
            the outputs must be equal bit for bit. With garbage at the other positions every row must change. Outputs
            and gradients of the short way must be those of the plain one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapted_modules import hosts_of
from inlay.core.contracts.adapter import Adapter
from inlay.core.forward.active_adapters import Roster, roster_of
from inlay.core.forward.host import Forward, Host, Storage
from inlay.core.forward.route import Route
from inlay.core.upstream import tree_leaves
from inlay.kernels.read_positions.index import Index
from inlay.kernels.read_positions.modules import Asked, Short, asking, only
from inlay.kernels.read_positions.probe import ROWS, Batch, drawn, with_first

GARBAGE = 1e3  # times a normal number
MOVED = 0.05  # what is added to trained values, times a normal number
# Relative to the norm: a product of fewer rows may sum in another order.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Found:
    """What modules can skip, for one form of call.

    Attributes:
        masked: paths of modules of which no masked position is read, except perhaps the first of a row.
        first: paths of modules of which only the first position of each row is read.
        handed: paths of those whose output goes into another one of the same kind, and nowhere else.
        agreeing: whether this holds only if exactly the masked positions hold the padding token.
    """

    masked: frozenset[str]
    first: frozenset[str]
    handed: frozenset[str] = frozenset()
    agreeing: bool = False

    @property
    def modules(self) -> frozenset[str]:
        return self.masked | self.first

    def wanted(self, unmasked: Index | None, first: Index) -> dict[str, Index]:
        """Module → the positions needed of it.

        Args:
            unmasked: the first of each row, and all that are not masked; None if too few could be skipped.
            first: the first of each row.
        """
        return dict.fromkeys(self.first, first) | ({} if unmasked is None else dict.fromkeys(self.masked, unmasked))


def tried(model: nn.Module, adapter: Adapter | None, batch: Batch) -> tuple[Found | None, dict[str, Any]]:
    """What can be skipped, and the model's configuration after a call.

    Args:
        adapter: the active one.

    Returns:
        None and an empty dictionary if nothing can be skipped, or the model cannot be copied.
    """
    with (
        torch.inference_mode(False),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            twin = twin_of(model, adapter)
        except Exception:  # a model may hold anything, things that cannot be copied among them
            return None, {}
        found, complete = _Trial(twin, adapter, batch).found()
        if not complete and batch.padding is not None:
            other, _ = _Trial(twin, adapter, batch, agreeing=True).found()
            if other is not None and (found is None or len(other.modules) > len(found.modules)):
                found = other
        return found, {} if found is None else getattr(getattr(twin, "config", None), "__dict__", {})


def twin_of(model: nn.Module, adapter: Adapter | None) -> nn.Module:
    """A copy that shares every parameter with the model but those of one adapter, which are moved at random."""
    own = set() if adapter is None else {id(p) for p in adapter.parameters()}
    hosts = hosts_of(model)
    others = {name for name in hosts.roster.adapters if adapter is None or name != adapter.name}
    owners: list[Any] = [hosts.roster.adapters]
    owners += [owner for host in hosts for owner in (host.deltas, host.differences, host.copies)]
    owners += [module._modules["inlay"]._modules for module in model.modules() if _stores(module)]  # type: ignore[union-attr]
    shared = [p for p in model.parameters() if id(p) not in own]
    shared += [owner[name] for owner in owners for name in others & owner.keys()]
    twin = copy.deepcopy(model, {id(thing): thing for thing in shared})
    if adapter is None:
        return twin
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in roster_of(twin).adapters[adapter.name].parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True).add_(_normal(parameter, generator), alpha=MOVED)
    return twin


def _stores(module: nn.Module) -> bool:
    return isinstance(module._modules.get("inlay"), Storage)


class _Trial:
    """One trial.

    Attributes:
        tolerance: relative, by the lowest precision that any module computes in.
    """

    def __init__(self, twin: nn.Module, adapter: Adapter | None, batch: Batch, agreeing: bool = False) -> None:
        self.twin, self.batch, self.agreeing = twin, batch, agreeing
        self.roster = roster_of(twin)
        self.name = None if adapter is None else adapter.name
        self.adapter = None if adapter is None else self.roster.adapters[adapter.name]
        self.trained = [] if self.adapter is None else [p for p in self.adapter.parameters() if p.requires_grad]
        self.tolerance = 0.0

    def found(self) -> tuple[Found | None, bool]:
        """What can be skipped, None if nothing; and whether every module that works by position can skip something."""
        config = getattr(self.twin, "config", None)
        try:
            with self.roster.bind(Route((self.name,)), None):
                given, unmasked = drawn(self.batch, config, self.agreeing, seed=0)
                self.quieten(given)
                found, complete = self.look(given, unmasked)
                given, unmasked = drawn(self.batch, config, self.agreeing, seed=1)
                proved = bool(found.modules) and self.proves(found, given, unmasked)
        except Exception:  # a model may refuse rearranged tokens in any way it likes
            return None, False
        return (found, complete) if proved else (None, False)

    def quieten(self, given: Mapping[str, Any]) -> None:
        """Put deltas with random draws (dropout) into evaluation mode, where two runs can be compared."""
        inside = [m for module in (self.adapter.modules() if self.adapter else ()) for m in module.modules()]
        modes, states = [m.training for m in inside], []
        for training in (modes, [False] * len(inside)):
            for module, mode in zip(inside, training, strict=True):
                module.training = mode
            with torch.no_grad():
                self.run(given)
            states.append(torch.get_rng_state())
        if torch.equal(*states):
            for module, mode in zip(inside, modes, strict=True):
                module.training = mode

    def run(self, given: Mapping[str, Any], asked: Asked | None = None) -> list[Tensor]:
        """Every tensor that the model returns; dropout is the same in each run.

        Raises:
            TypeError: among the outputs is something that may contain tensors we cannot find.
        """
        torch.default_generator.manual_seed(0)
        with asking(asked or Short(self.roster, {}, ())):  # or the copy would be tried in its turn
            out = self.twin(**given)
        leaves = tree_leaves(out)
        if not all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves):
            raise TypeError("an output of an unknown kind")
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def look(self, given: Mapping[str, Any], unmasked: Tensor) -> tuple[Found, bool]:
        """What is read of which modules, and whether all that work by position can skip something."""
        needed = with_first(unmasked)
        seen = _Look(self.roster, Index.of(needed))
        with torch.enable_grad():
            total = _sum(self.run(given, seen))
            taps = [call.tap for calls in seen.calls.values() for call in calls]
            grads = iter(torch.autograd.grad(total, taps, allow_unused=True))
        masked, first = set(), set()
        for path, calls in seen.calls.items():
            read = torch.zeros_like(unmasked)
            for _ in calls:
                grad = next(grads)
                read |= read if grad is None else grad.ne(0).flatten(2).any(-1)
            if not read[:, 1:].any():
                first.add(path)
            elif self.batch.mask is not None and not (read & ~needed).any():
                masked.add(path)
        with torch.no_grad():
            alone = self.by_position(seen)
        whole, beginning = frozenset(masked & alone), frozenset(first & alone)
        handed = seen.handed(whole) | seen.handed(beginning)
        return Found(whole, beginning, handed, self.agreeing), alone <= masked | first

    def by_position(self, seen: _Look) -> set[str]:
        """The modules that give the same for some positions alone; the outermost of nested ones."""
        chosen: set[str] = set()
        for path in sorted(seen.calls, key=lambda p: p.count(".")):
            inside = any(path.startswith(f"{other}.") for other in chosen)
            if not inside and path not in seen.spoiled and all(map(self.same_alone(seen, path), seen.calls[path])):
                chosen.add(path)
        return chosen

    def same_alone(self, seen: _Look, path: str) -> Any:
        """A test of one call: does the module give the same for the needed positions alone?"""
        module = self.twin.get_submodule(path)

        def same(call: _Call) -> bool:
            taken, expected = seen.index.take(call.x), seen.index.take(call.out)
            found = module(taken) if call.keyword is None else module(**{call.keyword: taken})
            self.tolerance = max(self.tolerance, AGREEMENT[expected.dtype])
            return type(found) is Tensor and found.shape == expected.shape and self.close([found], [expected])

        return same

    def proves(self, found: Found, given: Mapping[str, Any], unmasked: Tensor) -> bool:
        """Whether nothing reads skipped positions, every row depends on the others, and the short way is exact."""
        first = torch.zeros_like(unmasked).index_fill(1, torch.tensor(0), True)
        needed = with_first(unmasked)
        read = dict.fromkeys(found.masked, needed) | dict.fromkeys(found.first, first)
        with torch.no_grad():
            plain = self.run(given)
            for garbage in (0.0, GARBAGE):
                if not _equal(self.run(given, _Fill(self.roster, read, garbage)), plain):
                    return False
            others = {path: ~where for path, where in read.items()}
            disturbed = self.run(given, _Fill(self.roster, others, GARBAGE))
        by_row = [_by_row(a, b) for a, b in zip(plain, disturbed, strict=True) if a.dim() and a.shape[0] == ROWS]
        if not by_row or not torch.stack(by_row).any(0).all():
            return False
        short = Short(self.roster, found.wanted(Index.of(needed), Index.of(first)), found.handed)
        with torch.enable_grad():
            return self.close(*(self.with_gradients(given, asked) for asked in (short, None)))

    def with_gradients(self, given: Mapping[str, Any], asked: Asked | None) -> list[Tensor]:
        """The outputs, and the adapter's gradients from a backward pass outside of `asked`, as in training."""
        outs = self.run(given, asked)
        grads = torch.autograd.grad(_sum(outs), self.trained, allow_unused=True) if self.trained else ()
        return [*outs, torch.cat([grad.flatten() for grad in grads if grad is not None])] if grads else outs

    def close(self, found: list[Tensor], expected: list[Tensor]) -> bool:
        """Whether tensors are equal within the tolerance."""
        return len(found) == len(expected) and all(
            a.shape == b.shape and bool((a - b).float().norm() <= self.tolerance * b.float().norm())
            for a, b in zip(found, expected, strict=True)
        )


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module.

    Attributes:
        x: its input.
        keyword: the input's name, None if it was positional.
        tap: zeros added to the output, whose gradient is the output's.
        source: path of the candidate whose output x is.
    """

    x: Tensor
    keyword: str | None
    out: Tensor
    tap: Tensor
    source: str | None


@dataclass(eq=False)
class _Look:
    """Records the calls of candidates that take and give one tensor of all positions and draw no random numbers.

    Attributes:
        calls: path → its calls.
        spoiled: paths with some other call.
        made: id of an output → the output and the path of its module.
    """

    roster: Roster
    index: Index
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    spoiled: set[str] = field(default_factory=set)
    made: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def handed(self, among: frozenset[str]) -> frozenset[str]:
        """The modules whose every output is the input of one other module among these."""
        pairs = {path: {call.source for call in self.calls[path]} for path in among}
        sources = {path: next(iter(found)) for path, found in pairs.items() if len(found) == 1}
        return frozenset(
            a for b, a in sources.items() if a in among and len(self.calls[a]) == len(self.calls[b])
            and list(sources.values()).count(a) == 1
        )  # fmt: skip

    def at(self, host: Host, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, x = torch.get_rng_state(), only(args, kwargs)
        out = inner(*args, **kwargs)
        if not (self.index.fits(x) and self.index.fits(out) and torch.equal(state, torch.get_rng_state())):
            self.spoiled.add(host.path)
            return out
        tap = torch.zeros_like(out, requires_grad=True)
        keyword = None if args else next(iter(kwargs))
        _, source = self.made.get(id(x), (None, None))
        self.calls.setdefault(host.path, []).append(_Call(x.detach(), keyword, out.detach(), tap, source))
        tapped = out + tap
        self.made[id(tapped)] = tapped, host.path
        return tapped


@dataclass(eq=False)
class _Fill:
    """Overwrites outputs at the positions that are not kept with random numbers of a given size."""

    roster: Roster
    kept: Mapping[str, Tensor]
    size: float

    def at(self, host: Host, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out, kept = inner(*args, **kwargs), self.kept.get(host.path)
        if kept is None or not isinstance(out, Tensor) or out.shape[:2] != kept.shape:
            return out
        garbage = _normal(out, torch.Generator().manual_seed(0)) * self.size
        return torch.where(kept.view(*kept.shape, *[1] * (out.dim() - 2)), out, garbage)


def _sum(outs: list[Tensor]) -> Tensor:
    """A number that depends on every entry of the outputs."""
    generator = torch.Generator().manual_seed(0)
    floats = [out for out in outs if out.is_floating_point()]
    return torch.stack([(out.float() * _normal(out, generator)).sum() for out in floats]).sum()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _by_row(one: Tensor, other: Tensor) -> Tensor:
    """Which rows of two tensors differ."""
    return one.ne(other).flatten(1).any(1) if one.dim() > 1 else one.ne(other)


def _same(tensor: Tensor) -> Tensor:
    return tensor
