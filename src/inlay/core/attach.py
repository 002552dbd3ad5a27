"""Putting adapters into a model and taking them out again; all or nothing.

build every piece ─▶ check ─▶ install at hosts ─▶ activate
(model untouched)            (undone if it fails)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from torch import nn

from inlay.core.adapted_modules import hosts_of
from inlay.core.build import build, initialise
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import Batches, Method
from inlay.core.errors import SelectionError, UnsupportedError
from inlay.core.forward.active_adapters import find_roster, roster_of
from inlay.core.install import install, uninstall
from inlay.core.measure import check_data
from inlay.core.model.layer import settle_all, unsettle_all
from inlay.core.model.select import Places, Where


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    where: Where | None = None,
    layers: Sequence[int] | None = None,
    modules_to_save: Sequence[str] = (),
    data: Batches | None = None,
) -> Adapter:
    """Put a method's trained pieces into `model`, in place. The base is frozen; the adapter is active and trainable.

    Args:
        name: the adapter is used, saved and detached under it; letters, digits, ``_`` and ``-``.
        where: the places to adapt (`core/model/select.py`); None means those of the method's paper.
        layers: numbers of the layers to adapt; None means all.
        modules_to_save: modules, named by the ends of their paths, of which the adapter trains a copy of its own.
        data: batches of keyword arguments for the model's forward, for a method that is initialised from data (EVA,
            FISH mask); with labels where the method needs gradients.

    Raises:
        ConfigError: data is missing, or given to a method that takes none.
        AdapterNameError: the name is taken or ill-formed.
        SelectionError: `where`, `layers` or `modules_to_save` match nothing, or something the method cannot adapt.
        UnsupportedError: the method cannot be exact on this model. Whatever is raised, the model is unchanged.
    """
    places = Places.of(where, layers)
    check_data(method, data)
    if data is None:
        measured = method.inherit(model)
        if measured.places is not None and (where, layers) != (None, None):
            raise SelectionError(
                f"method {method.name!r} is placed where the adapters it combines are; leave `where` and `layers` out"
            )
        places = measured.places or places
    else:
        build(model, method, name=name, places=places, modules_to_save=modules_to_save)  # refuse before measuring
        fresh = find_roster(model) is None
        try:
            if fresh:
                settle_all(model)
            measured = method.measure(model, places, data)
        finally:
            if fresh:
                unsettle_all(model)
    adapter = build(model, measured.method, name=name, places=places, modules_to_save=modules_to_save)
    initialise(model, adapter, measured.values)
    install(model, adapter, trainable=True)
    return adapter


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter out. Once the last one is out, the model is as it was before the first attach.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    roster = roster_of(model)
    adapter = roster.require(name)
    if roster.merged is not None:
        raise UnsupportedError(f"adapter {roster.merged.name!r} is merged into this model; call unmerge() first")
    uninstall(hosts_of(model), adapter)
    roster.kept.clear()


@contextmanager
def use(model: nn.Module, choice: str | None | Sequence[str | None]) -> Iterator[None]:
    """Choose the active adapter for a block: a name, None for the base, or one of these a row.

    The choice holds for the calling thread or task only, and ends however the block is left. It does not change
    what is trained: which adapter is active and which is trainable are separate questions.

    Raises:
        AdapterNameError: a name is unknown.
        RouteError: the adapters cannot share a batch.
    """
    roster = roster_of(model)
    route = roster.check(choice)
    with roster.bind(route, None):
        yield


def adapters(model: nn.Module) -> Mapping[str, Adapter]:
    """Name → adapter, in the order of attaching; empty for a model without any."""
    roster = find_roster(model)
    return MappingProxyType(roster.adapters if roster is not None else {})
