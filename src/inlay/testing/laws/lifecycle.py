"""Laws of attaching, choosing, storing, copying and detaching."""

from __future__ import annotations

import copy
import itertools
import tempfile
from typing import Any
from unittest import mock

import torch
import yaml
from torch import nn

import inlay
from inlay.core.adapted_modules import Hosts
from inlay.core.contracts.method import Method
from inlay.core.errors import AdapterFileError, AdapterNameError, BaseMismatchError, ConfigError
from inlay.core.forward.host import Host
from inlay.testing.laws.scaffold import (
    Broken,
    accompany,
    attached,
    bare,
    census,
    close,
    forward,
    hold,
    parts,
    put,
    same,
    train,
)
from inlay.testing.specimen import Specimen


def identity(specimen: Specimen, method: Method) -> None:
    """A fresh adapter changes nothing, and no initialisation changes the base."""
    model, batch, before = specimen.build(), specimen.batch(2, 0), bare(specimen, 2, 0)
    model.requires_grad_(False)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    put(specimen, model, method)
    with inlay.use(model, None):
        same(forward(specimen, model, batch), before, "the base's outputs changed")
    for name, parameter in model.named_parameters():
        if name in weights:
            same(parameter, weights[name], f"the base's {name} changed")
    same(forward(specimen, model, batch), before, "a fresh adapter changes the outputs")


def silence(specimen: Specimen, method: Method) -> None:
    """A trained adapter has an effect, and none at all while the base is chosen or after an exception."""
    batch, before = specimen.batch(2, 0), bare(specimen, 2, 0)
    model = attached(specimen, method)
    changed = forward(specimen, model, batch)
    with torch.no_grad():
        close(specimen.logits(model(**batch)), changed, "labels change the scores")
    hold(float((changed - before).abs().max()) > 1e-3, "a trained adapter has no effect")
    with inlay.use(model, None):
        same(forward(specimen, model, batch), before, "the base was chosen, something else answered")
    try:
        with inlay.use(model, None):
            raise KeyError("any")
    except KeyError:
        pass
    same(forward(specimen, model, batch), changed, "an exception inside use() left its choice in force")
    for wrong in ("onne", ["one", "onne"]):
        try:
            with inlay.use(model, wrong):
                raise Broken(f"use({wrong!r}) accepted an unknown name")
        except AdapterNameError:
            pass


def storage(specimen: Specimen, method: Method) -> None:
    """Saving and loading is bit-exact and strict: other bases and damaged files leave the model untouched."""
    model, batch = attached(specimen, method), specimen.batch(2, 2)
    expected = forward(specimen, model, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = inlay.save(model, "one", folder)
        fresh = specimen.build()
        loaded = inlay.load(fresh, folder)
        same(forward(specimen, fresh, batch), expected, "the loaded adapter computes something else")
        hold(loaded.digest == inlay.adapters(model)["one"].digest, "the loaded adapter has another digest")
        hold(loaded.method == inlay.adapters(model)["one"].method, f"the loaded method is {loaded.method}")
        hold(not loaded.trainable, "a loaded adapter is trainable unasked")

        other = specimen.build()
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.is_floating_point() and not parts(parameter):
                    parameter.mul_(1.25)
        _refused(other, folder, BaseMismatchError, "an adapter of another base")
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        _refused(specimen.build(), folder, AdapterFileError, "half a file")
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        _refused(specimen.build(), folder, AdapterFileError, "a changed value")


def _refused(model: nn.Module, folder: str, error: type[Exception], what: str) -> None:
    before = census(model)
    try:
        inlay.load(model, folder)
    except error:
        hold(census(model) == before, f"{what} was refused but left something behind")
        return
    raise Broken(f"{what} was loaded")


def detach_restores(specimen: Specimen, method: Method) -> None:
    """Detaching restores classes, keys, flags, attributes and outputs, in whatever order adapters go."""
    model, batch = specimen.build(), specimen.batch(2, 7)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(parameter.is_floating_point() and i % 3 != 0)
    before, outputs = census(model), forward(specimen, model, batch)
    train(put(specimen, model, method))
    accompany(specimen, model, "two")
    with inlay.use(model, "two"):
        kept = forward(specimen, model, batch)
    inlay.detach(model, "one")
    same(forward(specimen, model, batch), kept, "detaching one adapter changed another")
    inlay.detach(model, "two")
    for what, value in census(model).items():
        hold(value == before[what], f"detaching did not restore the {what}")
    same(forward(specimen, model, batch), outputs, "detaching did not restore the outputs")


def all_or_nothing(specimen: Specimen, method: Method) -> None:
    """An attach that fails half way leaves no trace, on a bare model and beside another adapter."""
    own_grant = Hosts.grant
    for crowded in (False, True):
        model = specimen.build()
        if crowded:
            put(specimen, model, inlay.LoRA(rank=2), "two")
        before = census(model)
        granted = itertools.count()

        def grant(hosts: Hosts, path: str, *features: str, granted: Any = granted) -> Host:
            if next(granted) >= 4:
                raise MemoryError("no room")
            return own_grant(hosts, path, *features)

        try:
            with mock.patch.object(Hosts, "grant", grant):
                put(specimen, model, method)
        except MemoryError:
            pass
        else:
            return  # fewer steps than the failing one
        for what, value in census(model).items():
            hold(value == before[what], f"a failed attach changed the {what}")
        for name, error in (
            ("", AdapterNameError),
            ("a.b", AdapterNameError),
            *([("two", AdapterNameError)] * crowded),
        ):
            try:
                put(specimen, model, method, name)
            except error:
                hold(census(model) == before, f"attach under {name!r} was refused but left something behind")
            else:
                raise Broken(f"attach accepted the name {name!r}")


def copying(specimen: Specimen, method: Method) -> None:
    """A deep copy computes the same and shares nothing: changing one leaves the other."""
    model, batch = attached(specimen, method), specimen.batch(2, 10)
    expected = forward(specimen, model, batch)
    twin = copy.deepcopy(model)
    same(forward(specimen, twin, batch), expected, "a deep copy computes something else")
    train(inlay.adapters(twin)["one"], seed=11)
    hold(not torch.equal(forward(specimen, twin, batch), expected), "a deep copy's adapter is not the one it uses")
    same(forward(specimen, model, batch), expected, "changing a deep copy changed the original")
    inlay.detach(twin, "one")
    same(forward(specimen, model, batch), expected, "detaching from a deep copy changed the original")


def configuration(specimen: Specimen, method: Method) -> None:
    """Hyper-parameters survive YAML; unknown ones are errors that name the nearest."""
    again = type(method).from_dict(yaml.safe_load(yaml.safe_dump(_listed(method.to_dict()))))
    hold(again == method, f"{method} became {again}")
    for key in [k for k in method.to_dict() if k != "method"][:1]:
        try:
            type(method).from_dict({key + "x": 1})
        except ConfigError as error:
            hold(repr(key) in str(error), f"the error does not suggest {key!r}: {error}")
        else:
            raise Broken(f"{key}x was accepted")


def _listed(value: Any) -> Any:
    """Tuples as lists, as a YAML file has them."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (tuple, list)) else value
