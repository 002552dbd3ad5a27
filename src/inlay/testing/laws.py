"""The laws: what holds for every method on every model, each one a function that raises when it does not.

A law takes a `Specimen` and a `Method` instance. Adapters are given random values first ("trained"), because
a fresh one changes nothing and would obey most laws by doing nothing; each law that compares outputs
therefore also holds that the adapter has an effect where that matters (`silence`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn

import inlay
from inlay.core import install
from inlay.core.adapter import Adapter
from inlay.core.delta import DeltaMethod
from inlay.core.errors import (
    AdapterFileError,
    AdapterNameError,
    BaseMismatchError,
    ConfigError,
    RouteError,
    UnsupportedError,
)
from inlay.core.method import Method
from inlay.core.pieces import SubsetPiece
from inlay.testing.specimen import Specimen

TOLERANCE = 2e-5  # float32, logits of order one: summation order differs between batch shapes
ROWS = 4

Law = Callable[[Specimen, Method], None]


class Broken(AssertionError):
    """A law does not hold."""


def hold(condition: bool, message: str) -> None:
    if not condition:
        raise Broken(message)


def close(one: Tensor, other: Tensor, message: str, tolerance: float = TOLERANCE) -> None:
    worst = float((one.float() - other.float()).abs().max()) if one.numel() else 0.0
    scale = max(1.0, float(other.float().abs().max()))
    hold(worst <= tolerance * scale, f"{message}: differs by {worst:.2e}, tolerance {tolerance * scale:.0e}")


def same(one: Tensor, other: Tensor, message: str) -> None:
    one, other = one.detach(), other.detach()
    hold(torch.equal(one, other), f"{message}: differs by {float((one.float() - other.float()).abs().max()):.2e}")


# -- scaffolding ------------------------------------------------------------------------------------


def train(adapter: Adapter, seed: int = 7, size: float = 0.1) -> None:
    """Random values in place of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def put(specimen: Specimen, model: nn.Module, method: Method, name: str = "one") -> Adapter:
    """Attach at the paper's places; in a plain module, which has none, at every layer the method can adapt."""
    plain = specimen.kind == "plain" and isinstance(method, DeltaMethod)
    return inlay.attach(model, method, name=name, where=_has_bias if plain else None)


def _has_bias(path: str, module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def attached(specimen: Specimen, method: Method, name: str = "one", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh base with a trained adapter on it."""
    model = specimen.build(dtype=dtype)
    torch.manual_seed(0)
    train(put(specimen, model, method, name))
    return model


def refusal(specimen: Specimen, method: Method) -> str | None:
    """Why the method cannot be attached to this model, or None; a refusal leaves the model as it was."""
    model = specimen.build()
    before = census(model)
    try:
        put(specimen, model, method)
    except inlay.UserError as error:
        hold(census(model) == before, "a refused attach left something behind")
        return str(error)
    try:
        forward(specimen, model, specimen.batch(2, 0))
    except UnsupportedError as error:
        return str(error)
    return None


def forward(specimen: Specimen, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return specimen.logits(model(**batch))


def census(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that detaching must restore, apart from its outputs."""
    return {
        "keys": list(model.state_dict()),
        "classes": [(n, type(m)) for n, m in model.named_modules()],
        "flags": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "attributes": [(n, sorted(m.__dict__)) for n, m in model.named_modules()],
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
    }


def loss(specimen: Specimen, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    return specimen.logits(out).float().square().mean() if getattr(out, "loss", None) is None else out.loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def partners(method: Method) -> dict[str, Method]:
    """Other methods for a mixed batch: one that changes layers and one that reads inputs."""
    return {"two": inlay.LoRA(rank=2), "three": inlay.IA3()}


def is_subset(model: nn.Module, name: str) -> bool:
    return any(isinstance(p, SubsetPiece) for p in inlay.adapters(model)[name].pieces)


# -- the laws ---------------------------------------------------------------------------------------


def identity(specimen: Specimen, method: Method) -> None:
    """A fresh adapter changes nothing, and no initialisation changes the base."""
    model, batch = specimen.build(), specimen.batch(2, 0)
    model.requires_grad_(False)
    before, weights = forward(specimen, model, batch), {n: p.clone() for n, p in model.named_parameters()}
    put(specimen, model, method)
    with inlay.use(model, None):
        same(forward(specimen, model, batch), before, "the base's outputs changed")
    for name, parameter in model.named_parameters():
        if name in weights:
            same(parameter, weights[name], f"the base's {name} changed")
    same(forward(specimen, model, batch), before, "a fresh adapter changes the outputs")


def silence(specimen: Specimen, method: Method) -> None:
    """A trained adapter has an effect, and none at all while the base is chosen or after an exception."""
    batch = specimen.batch(2, 0)
    bare = specimen.build()
    bare.requires_grad_(False)
    model = attached(specimen, method)
    changed, before = forward(specimen, model, batch), forward(specimen, bare, batch)
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


def views_agree(specimen: Specimen, method: Method) -> None:
    """Merged weights compute what the forward computes; unmerging is bit-exact; a refusal changes nothing."""
    model, batch = attached(specimen, method), specimen.batch(2, 1)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    expected = forward(specimen, model, batch)
    try:
        inlay.merge(model, "one")
        close(forward(specimen, model, batch), expected, "merged weights compute something else")
        inlay.unmerge(model)
    except UnsupportedError:
        pass
    for name, parameter in model.named_parameters():
        same(parameter, weights[name], f"{name} is not what it was before merging")
    same(forward(specimen, model, batch), expected, "outputs are not what they were before merging")


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
        hold(loaded.method == method, f"the loaded method is {loaded.method}")
        hold(not loaded.trainable, "a loaded adapter is trainable unasked")

        other = specimen.build()
        with torch.no_grad():
            for parameter in other.parameters():
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


def only_the_adapter_learns(specimen: Specimen, method: Method) -> None:
    """One step of training moves every part of the adapter and no bit of the base."""
    model, batch = attached(specimen, method), specimen.batch(ROWS, 3)
    adapter = inlay.adapters(model)["one"]
    owned = {id(p) for p in adapter.parameters()}
    base = {n: p.clone() for n, p in model.named_parameters() if id(p) not in owned}
    before = [p.clone() for p in adapter.parameters()]
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    loss(specimen, model, batch).backward()
    missing = [n for n, p in model.named_parameters() if id(p) in owned and p.grad is None]
    hold(not missing, f"no gradient reached {missing[:4]}")
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in base:
            hold(not parameter.requires_grad and parameter.grad is None, f"the base's {name} is being trained")
            same(parameter, base[name], f"the base's {name} changed")
    hold(
        all(not torch.equal(p, b) for p, b in zip(adapter.parameters(), before, strict=True)),
        "a part of the adapter did not move",
    )
    adapter.trainable = False
    with inlay.use(model, None), inlay.use(model, "one"):
        hold(not adapter.trainable, "choosing an adapter made it trainable")


def rows_are_independent(specimen: Specimen, method: Method) -> None:
    """A batch of several adapters equals one row at a time; wrong counts raise."""
    model = attached(specimen, method)
    for name, partner in partners(method).items():
        train(put(specimen, model, partner, name), seed=len(name))
    names: list[str | None] = ["one", None, "two", "three", "one"]
    if is_subset(model, "one"):
        try:
            with inlay.use(model, names):
                raise Broken("a batch was mixed with an adapter that changes the base for all rows")
        except RouteError as error:
            hold(method.name in str(error), "the refusal does not name the method")
        names = [None, "two", "three", None, "two"]
    ragged = specimen.kind not in ("vision", "plain")
    for side in specimen.padding_sides or ("right",):
        batch = specimen.batch(len(names), 4, ragged, side)
        with inlay.use(model, names):
            if specimen.shares_projections:
                _holds_back(specimen, model, batch)
                return
            mixed = forward(specimen, model, batch)
        for i, chosen in enumerate(names):
            alone = specimen.row(batch, i)
            with inlay.use(model, chosen):
                solo = forward(specimen, model, alone)
            row = mixed[i : i + 1]
            if specimen.task == "causal" and ragged:
                row = row[:, batch["attention_mask"][i].bool()]
            close(row, solo, f"row {i} ({chosen}), {side} padding, differs from the row alone")
    wrongs: list[list[str | None]] = [names[:-1], [*names, None], ["two"], names + names]
    for wrong in wrongs:
        try:
            with inlay.use(model, wrong):
                forward(specimen, model, batch)
        except RouteError:
            continue
        raise Broken(f"{len(names)} rows went through a route of {len(wrong)}")


def _holds_back(specimen: Specimen, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """A model that cannot be routed row by row refuses a mixed batch instead of guessing."""
    try:
        forward(specimen, model, batch)
    except RouteError:
        return
    raise Broken("a layer that is shared between rows was routed by row")


def mixed_training(specimen: Specimen, method: Method) -> None:
    """The gradients of a mixed batch are those of its rows trained alone."""
    model = attached(specimen, method)
    train(put(specimen, model, inlay.LoRA(rank=2), "two"))
    if is_subset(model, "one") or specimen.shares_projections:
        return
    names: list[str | None] = ["two", "one", None, "one"]
    batch = specimen.batch(4, 5)

    def energy(output: Any) -> Tensor:
        return specimen.logits(output).float().square().sum()

    with inlay.use(model, names):
        energy(model(**batch)).backward()
    mixed = gradients(model)
    model.zero_grad()
    for i, name in enumerate(names):
        if name is not None:
            with inlay.use(model, name):
                energy(model(**specimen.row(batch, i))).backward()
    solo = gradients(model)
    hold(mixed.keys() == solo.keys(), "other parameters got gradients in the mixed batch")
    for name in solo:
        close(mixed[name], solo[name], f"the gradient of {name} differs", 1e-4)


def generation(specimen: Specimen, method: Method) -> None:
    """Generating a mixed batch equals one row at a time, with a cache and without, greedy and with beams."""
    if not specimen.supports_generate:
        return
    model: Any = attached(specimen, method)
    train(put(specimen, model, inlay.LoRA(rank=2), "two"))
    names: list[str | None] = [None, "two", None] if is_subset(model, "one") else ["one", "two", None]
    batch = specimen.prompts(3, 6, ragged=True)
    for options in ({}, {"use_cache": False}, {"num_beams": 3}):
        settings = {"max_new_tokens": 4, "do_sample": False, **options}
        with inlay.use(model, names):
            mixed = model.generate(**batch, **settings)
        for i, name in enumerate(names):
            alone = {k: v[i : i + 1][:, batch["attention_mask"][i].bool()] for k, v in batch.items()}
            with inlay.use(model, name):
                solo = model.generate(**alone, **settings)
            hold(torch.equal(mixed[i, -4:], solo[0, -4:]), f"row {i} ({name}) generates otherwise alone, {options}")
    with inlay.use(model, "one"):
        hold(
            torch.equal(
                model.generate(**batch, max_new_tokens=4), model.generate(**batch, max_new_tokens=4, use_cache=False)
            ),
            "generation with a cache differs from generation without",
        )


def detach_restores(specimen: Specimen, method: Method) -> None:
    """Detaching restores classes, keys, flags, attributes and outputs, in whatever order adapters go."""
    model, batch = specimen.build(), specimen.batch(2, 7)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    before, outputs = census(model), forward(specimen, model, batch)
    train(put(specimen, model, method))
    train(put(specimen, model, inlay.LoRA(rank=2), "two"))
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
    for crowded in (False, True):
        model = specimen.build()
        if crowded:
            put(specimen, model, inlay.LoRA(rank=2), "two")
        before = census(model)
        steps = [mock.DEFAULT] * 4 + [MemoryError("no room")] * 100
        try:
            with mock.patch.object(install, "_grant", mock.Mock(wraps=install._grant, side_effect=steps)):
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


def checkpointing(specimen: Specimen, method: Method) -> None:
    """Both kinds of activation checkpointing give the same gradients, also for a route left before backward."""
    model: Any = attached(specimen, method)
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    train(put(specimen, model, inlay.LoRA(rank=2), "two"))
    batch = specimen.batch(3, 8)
    alone = is_subset(model, "one") or specimen.shares_projections
    routes: list[Any] = ["one", "two"] if alone else ["one", ["one", "two", None]]
    model.train()
    for route in routes:
        expected: dict[str, Tensor] | None = None
        for kind in (None, False, True):
            if kind and not _reentrant_works(specimen):
                continue
            if kind is not None:
                model.activation_checkpointing_enable({"use_reentrant": kind})
            model.zero_grad()
            torch.manual_seed(0)  # the same dropout
            with inlay.use(model, route):
                value = loss(specimen, model, batch)
            value.backward()
            found = gradients(model)
            model.activation_checkpointing_disable()
            if expected is None:
                expected = found
            hold(found.keys() == expected.keys(), f"checkpointing (reentrant={kind}) loses gradients, route {route}")
            for name in expected:
                close(found[name], expected[name], f"checkpointing (reentrant={kind}), route {route}, {name}", 1e-4)


@cache
def _reentrant_works(specimen: Specimen) -> bool:
    """Whether the bare model, trained whole, can be checkpointed that way: DeBERTa's layers share an input."""
    model: Any = specimen.build().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    try:
        loss(specimen, model, specimen.batch(3, 8)).backward()
    except RuntimeError:
        return False
    return True


def precision(specimen: Specimen, method: Method) -> None:
    """A bfloat16 base keeps its type throughout, adapters stay float32, and autocast works."""
    model = attached(specimen, method, dtype=torch.bfloat16)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in specimen.batch(3, 9).items()}
    out = specimen.logits(model(**batch))
    with inlay.use(model, None):
        own = forward(specimen, model, batch).dtype  # BART's is float32: it adds a float32 buffer at the end
    hold(out.dtype == own, f"a base that answers in {own} answers in {out.dtype}")
    out.float().square().mean().backward()
    for parameter in inlay.adapters(model)["one"].parameters():
        hold(parameter.dtype == torch.float32, "an adapter's parameter is not float32")
        hold(
            parameter.grad is not None and bool(parameter.grad.isfinite().all()), "a gradient is missing or not finite"
        )
    full = attached(specimen, method)
    for chosen, factor in ((None, 0.0), ("one", 3.0)):
        with inlay.use(full, chosen):
            plain = forward(specimen, full, specimen.batch(3, 9))
            with torch.autocast("cpu", torch.bfloat16):
                cast = forward(specimen, full, specimen.batch(3, 9))
        if chosen is None:  # what rounding does to the base itself: much, where it sends tokens to other experts
            own_error = float((cast.float() - plain.float()).abs().max())
        else:
            close(cast, plain, "autocast computes something else", max(0.15, factor * own_error))


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


def compiling(specimen: Specimen, method: Method) -> None:
    """One whole graph, the same numbers, and a new one when another adapter is chosen."""
    model, batch = attached(specimen, method), specimen.batch(2, 12)
    if specimen.task != "seq2seq":
        del batch["labels"]  # transformers' own loss logs while it is traced
    train(put(specimen, model, inlay.LoRA(rank=2), "two"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for route in ("one", "two", None, "one"):
        with inlay.use(model, route):
            close(forward(specimen, compiled, batch), forward(specimen, model, batch), f"compiled, {route}")  # type: ignore[arg-type]


LAWS: dict[str, Law] = {
    f.__name__: f
    for f in (
        identity, silence, views_agree, storage, only_the_adapter_learns, rows_are_independent, mixed_training,
        generation, detach_restores, all_or_nothing, checkpointing, precision, copying, configuration,
    )
}  # fmt: skip
SLOW_LAWS: dict[str, Law] = {"compiling": compiling}
