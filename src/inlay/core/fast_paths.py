"""`inlay.fast_paths`: which fast paths are on and at how many places, and how to switch them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

from torch import nn

from inlay.core.adapted_modules import Hosts, hosts_of, living
from inlay.core.contracts.delta import groups_itself, says_itself
from inlay.core.forward import wrappers
from inlay.core.forward.active_adapters import find_roster
from inlay.core.forward.chain import leaves
from inlay.core.forward.host import Host


@dataclass(frozen=True)
class FastPath:
    """One fast path.

    Attributes:
        does: what it does, in one line.
        on: whether it may run.
        places: number of modules of attached models where it can run (in training, in mixed batches, …).
    """

    name: str
    does: str
    on: bool
    places: int


class FastPaths(Mapping[str, FastPath]):
    """Name → fast path, as it was at the time of the call. Leaving a `with` block undoes the switch of that call."""

    def __init__(self, found: Mapping[str, FastPath], before: frozenset[str] | None = None) -> None:
        self._found, self._before = dict(found), before

    def __getitem__(self, name: str) -> FastPath:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __enter__(self) -> FastPaths:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            _put(self._before)

    def __repr__(self) -> str:
        lines = [f"{p.name:<20}{'on' if p.on else 'off':<5}{p.places:>5} places  {p.does}" for p in self.values()]
        return "\n".join(lines)


def fast_paths(on: bool | None = None, *names: str, model: nn.Module | None = None) -> FastPaths:
    """Say which fast paths are on, and switch them.

    A fast path computes the same as the model's own code, or an adapter's plain formula, but faster or in less memory.
    If a number looks wrong, ``inlay.fast_paths(False)`` makes inlay run the plain code everywhere: at once, in the
    whole process, in models that have adapters already too. ``with inlay.fast_paths(False): ...`` does so for the
    block only. The environment variable ``INLAY_FAST_PATHS=0`` does so from outside of the program.

    Args:
        on: True or False switches; None only reports.
        names: the fast paths to switch; all if none is given.
        model: count places in this attached model only; None counts in all that are alive.

    Raises:
        ConfigError: a name is unknown; nothing is switched.
    """
    if on is None and names:
        return FastPaths({name: found for name, found in _report(model).items() if name in wrappers.checked(names)})
    if on is None:
        return FastPaths(_report(model))
    before, after = frozenset(wrappers.OFF), wrappers.switched(on, names)
    _put(after)
    return FastPaths(_report(model), before)


def _put(off: frozenset[str]) -> None:
    wrappers.OFF.clear()
    wrappers.OFF.update(off)


def _report(model: nn.Module | None) -> dict[str, FastPath]:
    hosts = [host for owner in _owners(model) for host in owner]
    return {
        name: FastPath(name, does, wrappers.enabled(name), sum(_acts(name, host) for host in hosts))
        for name, does in wrappers.FAST_PATHS.items()
    }


def _owners(model: nn.Module | None) -> list[Hosts]:
    if model is None:
        return living()
    return [] if find_roster(model) is None else [hosts_of(model)]


def _acts(name: str, host: Host) -> bool:
    """Whether a fast path can run at a module."""
    kinds = {type(delta) for chain in host.deltas.values() for _, delta in leaves(chain)}
    match name:
        case "fused-update":
            return any(
                says_itself(kind, "with_layer", "pre", "post") or says_itself(kind, "post_into", "post")
                for kind in kinds
            )
        case "grouped-rows":
            return any(groups_itself(kind) for kind in kinds)
        case "prefix-attention":
            return "attention" in host.features
        case "kept-prompts":
            return host.path == "" and any(adapter.prompts for adapter in host.roster.adapters.values())
        case "packing":
            return host.path == ""
    return name in host.features
