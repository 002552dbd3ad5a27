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
    PARTNERS,
    ROWS,
    Broken,
    accompany,
    attached,
    bare,
    by_itself,
    close,
    forward,
    gradients,
    hold,
    is_subset,
    loss,
    put,
    same,
)
from inlay.testing.specimen import Side, Specimen

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
    for partner in PARTNERS:
        accompany(specimen, model, partner)
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
            if chosen == "one":
                with inlay.use(model, chosen):
                    solo = forward(specimen, model, specimen.row(batch, i))
            else:
                solo = _row_alone(specimen, chosen, len(names), i, ragged, side)
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


@cache
def _row_alone(specimen: Specimen, name: str | None, rows: int, row: int, ragged: bool, side: Side) -> Tensor:
    """What the base or a partner answers to a row of `rows_are_independent`, where nothing else is attached."""
    batch = specimen.batch(rows, 4, ragged, side)
    return forward(specimen, by_itself(specimen, name), specimen.row(batch, row))


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
    accompany(specimen, model, "two")
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
    accompany(specimen, model, "two")
    names: list[str | None] = [None, "two", None] if is_subset(model, "one") else ["two", "one", None]
    batch = specimen.prompts(3, 6, ragged=True)

    def generated(choice: Any, rows: dict[str, Tensor] = batch, **options: Any) -> Tensor:
        with inlay.use(model, choice):
            return _generated(model, rows, **options)

    mixed, own = generated(names), generated("one")
    hold(torch.equal(generated(names, use_cache=False), mixed), "a mixed batch generates otherwise without a cache")
    hold(torch.equal(generated("one", use_cache=False), own), "generation with a cache differs from generation without")
    beams = generated(names, num_beams=3)
    for i, name in enumerate(names):
        if name == "one":
            solo, solo_beams = own[i], generated(name, _unpadded(batch, i), num_beams=3)[0]
        else:
            solo, solo_beams = (_generated_alone(specimen, name, i, n) for n in (1, 3))
        hold(torch.equal(mixed[i], solo), f"row {i} ({name}) generates otherwise alone")
        hold(torch.equal(beams[i], solo_beams), f"row {i} ({name}) generates otherwise alone, with beams")


NEW = 4  # tokens to generate


def _generated(model: Any, rows: dict[str, Tensor], **options: Any) -> Tensor:
    found: Tensor = model.generate(**rows, max_new_tokens=NEW, do_sample=False, **options)
    return found[:, -NEW:]


def _unpadded(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    kept = batch["attention_mask"][row].bool()
    return {k: v[row : row + 1][:, kept] for k, v in batch.items()}


@cache
def _generated_alone(specimen: Specimen, name: str | None, row: int, beams: int) -> Tensor:
    """What the base or a partner makes of a row of `generation`, where nothing else is attached."""
    batch = specimen.prompts(3, 6, ragged=True)
    return _generated(by_itself(specimen, name), _unpadded(batch, row), num_beams=beams)[0]


def checkpointing(specimen: Specimen, method: Method) -> None:
    """Both kinds of activation checkpointing give the same gradients, also for a route left before backward."""
    model: Any = attached(specimen, method)
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    accompany(specimen, model, "two")
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
    own, rounding = _rounded(specimen)
    out = specimen.logits(model(**_in_half(specimen.batch(3, 9))))
    hold(out.dtype == own, f"a base that answers in {own} answers in {out.dtype}")
    out.float().square().mean().backward()
    for parameter in inlay.adapters(model)["one"].parameters():
        hold(parameter.dtype == torch.float32, "an adapter's parameter is not float32")
        hold(
            parameter.grad is not None and bool(parameter.grad.isfinite().all()), "a gradient is missing or not finite"
        )
    full, batch = attached(specimen, method), specimen.batch(3, 9)
    plain = forward(specimen, full, batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = forward(specimen, full, batch)
    close(cast, plain, "autocast computes something else", max(0.15, 3 * rounding))


@cache
def _rounded(specimen: Specimen) -> tuple[torch.dtype, float]:
    """Of the base itself: the type of what it answers in half precision (BART's is float32: it adds a float32 buffer
    at the end), and what autocast does to it (much, where rounding sends tokens to other experts)."""
    own = forward(specimen, specimen.build(dtype=torch.bfloat16), _in_half(specimen.batch(3, 9))).dtype
    plain = bare(specimen, 3, 9)
    with torch.autocast("cpu", torch.bfloat16):
        cast = forward(specimen, by_itself(specimen, None), specimen.batch(3, 9))
    return own, float((cast.float() - plain.float()).abs().max())


def _in_half(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}


def compiling(specimen: Specimen, method: Method) -> None:
    """One whole graph, the same numbers, and a new one when another adapter is chosen."""
    model, batch = attached(specimen, method), specimen.batch(2, 12)
    if specimen.task != "seq2seq":
        del batch["labels"]  # transformers' own loss logs while it is traced
    accompany(specimen, model, "two")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for route in ("one", "two", "one"):
        with inlay.use(model, route):
            close(forward(specimen, compiled, batch), forward(specimen, model, batch), f"compiled, {route}")  # type: ignore[arg-type]
