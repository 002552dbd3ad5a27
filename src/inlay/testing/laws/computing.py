"""Laws of what an attached model computes: merged, mixed, generated, trained, recomputed, rounded, compiled."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import Method
from inlay.core.errors import RouteError, UnsupportedError
from inlay.testing.laws.scaffold import (
    ROWS,
    Broken,
    attached,
    close,
    forward,
    gradients,
    hold,
    is_subset,
    loss,
    partners,
    put,
    same,
    train,
)
from inlay.testing.specimen import Specimen

RESUMED = ("llama", "bert", "t5", "sequential")  # one of each kind: the loop does not depend on the architecture


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


def only_the_adapter_learns(specimen: Specimen, method: Method) -> None:
    """One step of training moves every part of the adapter and no bit of the base."""
    model, batch = attached(specimen, method), specimen.batch(ROWS, 3)
    adapter = inlay.adapters(model)["one"]
    owned = {id(p) for p in adapter.parameters()}
    base = {n: p.clone() for n, p in model.named_parameters() if id(p) not in owned}
    before = [p.clone() for p in adapter.parameters()]
    model.train()
    stray = [p for p in model.parameters() if p.requires_grad and id(p) not in owned]
    groups = adapter.parameter_groups(1e-2, weight_decay=0.1)  # as the method asks: LoRA+ refuses a single rate
    optimizer = torch.optim.AdamW([*groups, {"params": stray, "lr": 1e-2}])
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


def resuming(specimen: Specimen, method: Method) -> None:
    """Training that is stopped and taken up again gives the same numbers as without the stop."""
    if specimen.name not in RESUMED:
        return

    def fresh() -> tuple[nn.Module, Adapter, torch.optim.Optimizer]:
        model = specimen.build()
        torch.manual_seed(0)
        adapter = put(specimen, model, method)
        return model.train(), adapter, torch.optim.AdamW(adapter.parameter_groups(1e-2))

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            loss(specimen, model, specimen.batch(2, seed)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, adapter, optimizer = fresh()
    steps(model, optimizer, range(2))
    stored = {n: t.clone() for n, t in adapter.tensors().items()}
    state = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, range(2, 4))

    again, resumed, other = fresh()
    with torch.no_grad():
        for name, tensor in resumed.tensors().items():
            tensor.copy_(stored[name])
    other.load_state_dict(state)
    steps(again, other, range(2, 4))
    for name, tensor in resumed.tensors().items():
        same(tensor, adapter.tensors()[name], f"{name} after resuming")


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


def compiling(specimen: Specimen, method: Method) -> None:
    """One whole graph, the same numbers, and a new one when another adapter is chosen."""
    model, batch = attached(specimen, method), specimen.batch(2, 12)
    if specimen.task != "seq2seq":
        del batch["labels"]  # transformers' own loss logs while it is traced
    train(put(specimen, model, inlay.LoRA(rank=2), "two"))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for route in ("one", "two", None, "one"):
        with inlay.use(model, route):
            close(forward(specimen, compiled, batch), forward(specimen, model, batch), f"compiled, {route}")  # type: ignore[arg-type]
