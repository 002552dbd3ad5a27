"""`inlay plan`: what training would need, and which settings fit, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inlay.cli import flags
from inlay.train.options import choices

if TYPE_CHECKING:
    from inlay.machine.precision import Choice, Precision
    from inlay.plan import Fit, Machine, Plan, Planner, Setting, Skeleton

LENGTH, BATCH = 512, 16  # tokens and rows, where nothing is said


def plan(
    base: Annotated[
        str | None,
        typer.Option(
            help="Transformers folder, config.json or hub id; no weights are read. Default: the embedded base."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Methods, with commas. Default: all; with --memory, lora.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Hyper-parameter of the one method. Repeatable."),
    ] = None,
    where: Annotated[str | None, typer.Option(help="Places, as for inlay train. Default: the method's.")] = None,
    task: Annotated[str | None, typer.Option(help=f"One of {choices('task')}. Default: the base's.")] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"One of {choices('precision')}. Default: auto, as inlay train chooses there.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help=f"Format of its weights: {choices('quantize')}; none for --memory to try no other."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows in a pass. Default: 16; with --memory, searched.")
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Passes in a step.")] = 1,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a row. Default: 512; with --memory, searched.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Search the settings that fit into this much, e.g. 16GiB.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help='Plan for this GPU, e.g. "RTX 4090": its speed, and its memory for --memory gpu.')
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda: this machine, measured in a moment. Default: cpu.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine anew, not only once a month.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a chart to this HTML file.")] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Say what training would need, by role, and which settings fit."""
    from inlay.cli.tables import show_text
    from inlay.core.errors import ConfigError
    from inlay.machine.precision import device_named
    from inlay.plan.machine import half_planned

    if gpu is not None and device is not None:
        raise ConfigError("--gpu and --device exclude each other: one is a GPU that need not be here, one this machine")
    limit = None if memory is None or memory == "gpu" else _amount(memory)
    if plot is not None:
        from inlay.plan.chart import check_chart

        check_chart(plot)
    skeleton = _skeleton(base, task)
    chosen = partial(_chosen, skeleton, precision, half_planned(gpu, device), gpu or device_named(device or "cpu"))
    start = _start(skeleton, chosen, quantize, gradient_checkpointing, batch_size, accumulate, max_length)
    methods = _methods(method or ("lora" if memory is not None else None), set_)
    machine = _machine(gpu, device, measure)
    if memory == "gpu":
        limit = machine.memory if gpu is not None else None
        if limit is None:
            raise ConfigError("--memory gpu needs --gpu with a name; or give an amount such as 16GiB")
    name = base or "the embedded base"
    if limit is None:
        planners = {m.name: _planner(skeleton, m, where, start.quantisation, machine) for m in methods}
        rows, refused = _each(planners, start, as_json)
        if not as_json:
            show_text(str(chosen(start.quantisation is not None)))
        _show_plans(rows, refused, machine, name, as_json)
        shown = rows
    else:
        ways = [
            (_planner(skeleton, m, where, kept, machine), _kept_in(start, kept, chosen))
            for m in methods
            for kept in ([start.quantisation] if quantize is not None else [None, "nf4"])
        ]
        room = limit - machine.overhead_bytes
        fits = _search(ways, room, batch_size, max_length, gradient_checkpointing)
        if not as_json:
            show_text(str(chosen(start.quantisation is not None)))
        _show_fits(fits, limit, machine, name, as_json)
        shown = [fit.fits for fit in fits if fit.fits is not None]
    if plot is not None:
        from inlay.plan.chart import write_chart

        write_chart(shown, plot, title=f"Training on {name}", limit=limit, overhead=machine.overhead_bytes)


def _amount(memory: str) -> int:
    from inlay.core.errors import ConfigError
    from inlay.sizes import bytes_of

    try:
        limit = bytes_of(memory)
    except ValueError as error:
        raise ConfigError(f"--memory {error}") from error
    if not limit:
        raise ConfigError(f"--memory {memory!r} is nothing: give an amount such as 16GiB")
    return limit


def _skeleton(base: str | None, task: str | None) -> Skeleton:
    from inlay.plan import Skeleton, read_config

    if base is None:
        from inlay.assets import base_path

        base = str(base_path())
    return Skeleton(read_config(base), task=task)


def _start(
    skeleton: Skeleton, chosen: Callable[[bool], Choice], quantize: str | None, checkpointing: bool,
    batch_size: int | None, accumulate: int, max_length: int | None,
) -> Setting:  # fmt: skip
    from inlay.core.errors import ConfigError, nearest
    from inlay.plan import Setting
    from inlay.plan.setting import BYTES_PER_WEIGHT

    if quantize not in (None, "none", *BYTES_PER_WEIGHT):
        raise ConfigError(f"quantisation {quantize!r} is unknown{nearest(str(quantize), [*BYTES_PER_WEIGHT, 'none'])}")
    context = skeleton.context
    if max_length is not None and context is not None and max_length > context:
        raise ConfigError(f"max_length is {max_length}, but the base reads {context} tokens. Give at most {context}")
    start = Setting(
        checkpointing=checkpointing,
        batch=batch_size or BATCH,
        length=max_length or min(LENGTH, context or LENGTH),
        accumulate=accumulate,
    )
    return _kept_in(start, None if quantize == "none" else quantize, chosen)


def _chosen(skeleton: Skeleton, precision: str | None, half: Precision | None, device: str, quantised: bool) -> Choice:
    """What `inlay train` would hold and compute the base in."""
    from inlay.machine.precision import choose
    from inlay.train.loading import asked_precision

    return choose(asked_precision(precision or "auto"), skeleton.precision, half, device=device, quantised=quantised)


def _kept_in(start: Setting, quantize: str | None, chosen: Callable[[bool], Choice]) -> Setting:
    from dataclasses import replace

    kept: Any = quantize
    return replace(start, precision=chosen(quantize is not None).precision, quantisation=kept)


def _methods(words: str | None, set_: list[str] | None) -> list[Any]:
    from inlay.core.errors import ConfigError
    from inlay.methods import method_named, registry
    from inlay.train.hyper import build_method, parse_settings

    names = list(registry()) if words is None else [w.strip() for w in words.split(",") if w.strip()]
    if set_ and len(names) != 1:
        raise ConfigError("--set is for one method: give its name with --method")
    if set_:
        return [build_method(names[0], parse_settings(names[0], set_))]
    return [method_named(name)() for name in names]


def _machine(gpu: str | None, device: str | None, measure: bool) -> Machine:
    from inlay.plan import calibrate, machine_named

    return machine_named(gpu) if gpu is not None else calibrate(device or "cpu", anew=measure)


def _planner(skeleton: Skeleton, method: Any, where: str | None, quantize: str | None, machine: Machine) -> Planner:
    from inlay.core.errors import ConfigError
    from inlay.plan import Planner
    from inlay.train.hyper import usual_places
    from inlay.train.words import places

    try:
        chosen = usual_places(method, quantize) if where is None else places(where)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    return Planner(skeleton, method, where=chosen, machine=machine)


def _each(planners: dict[str, Planner], setting: Setting, quiet: bool) -> tuple[list[Plan], dict[str, str]]:
    """A plan a method; what one method alone asks for is an error, among many it is told."""
    from inlay.cli.output import stages
    from inlay.core.errors import UserError

    plans, refused = [], {}
    with stages(quiet) as report:
        for done, (name, planner) in enumerate(planners.items(), 1):
            try:
                plans.append(planner.plan(setting))
            except UserError as error:
                if len(planners) == 1:
                    raise
                refused[name] = str(error)
            planner.forget()
            report("planning", done, len(planners))
    return plans, refused


def _search(
    ways: list[tuple[Planner, Setting]], room: float, batch_size: int | None, max_length: int | None,
    checkpointing: bool,
) -> list[Fit]:  # fmt: skip
    """Of each method what fits first, the least quantised weights before the others."""
    from inlay.core.errors import ConfigError
    from inlay.plan.search import BATCHES, LENGTHS, search

    if room <= 0:
        raise ConfigError("the process alone needs more than --memory; give more")
    found: list[tuple[str, Fit]] = []
    for planner, start in ways:
        context = planner.skeleton.context
        lengths = [n for n in LENGTHS if context is None or n <= context] or [context or LENGTHS[0]]
        fits = search(
            planner,
            room,
            start=start,
            quantisations=[start.quantisation],
            lengths=[max_length] if max_length else lengths[:3],
            batches=[batch_size] if batch_size else BATCHES,
            checkpointing=[True] if checkpointing else [False, True],
        )
        found += [(planner.method.name, fit) for fit in fits]
    order = list(dict.fromkeys(name for name, _ in found))
    return [fit for _, fit in sorted(found, key=lambda f: (order.index(f[0]), f[1].fits is None))]


def _show_plans(plans: list[Plan], refused: dict[str, str], machine: Machine, base: str, as_json: bool) -> None:
    from inlay.cli.output import write_json
    from inlay.cli.tables import show_table, show_text
    from inlay.plan.chart import told_setting
    from inlay.plan.setting import ROLES
    from inlay.sizes import told_bytes

    if as_json:
        rows = [plan.to_dict() for plan in plans]
        write_json({"base": base, "machine": machine.to_dict(), "plans": rows, "refused": refused})
        return
    setting = f": {told_setting(plans[0])}" if plans else ""
    title = f"Training on {base}{setting}"
    if len(plans) == 1 and not refused:
        _show_plan(plans[0], title)
    else:
        columns = ("method", "trained", *ROLES, "total", "tokens/s", "disk")
        cells = [
            [
                plan.method, f"{plan.trainable:,}", *(told_bytes(getattr(plan.memory, role)) for role in ROLES),
                told_bytes(plan.memory.total), _speed(plan), told_bytes(plan.disk_bytes),
            ]
            for plan in plans
        ]  # fmt: skip
        # What is left out first differs least between methods.
        lesser = ("weights", "logits", "disk", "temporary", "gradients", "adapter", "optimizer", "activations")
        show_table(title, columns, cells, numbers=columns[1:], whole=("method",), lesser=lesser)
    for name, reason in refused.items():
        show_text(f"{name} cannot be planned: {reason}")
    show_text(_footnote(machine))


def _show_plan(plan: Plan, title: str) -> None:
    """One method: its memory by role and the sum, then the rest."""
    from inlay.cli.tables import show_facts
    from inlay.plan.setting import ROLES
    from inlay.sizes import told_bytes

    facts = {"method": plan.method, "trained parameters": plan.trainable, "memory": told_bytes(plan.memory.total)}
    facts |= {f"– {role}": told_bytes(getattr(plan.memory, role)) for role in ROLES}
    show_facts(title, facts | {"tokens/s": _speed(plan), "on disk": told_bytes(plan.disk_bytes)})


def _show_fits(fits: list[Fit], limit: int, machine: Machine, base: str, as_json: bool) -> None:
    from inlay.cli.output import write_json
    from inlay.cli.tables import show_table, show_text
    from inlay.sizes import told_bytes

    fitting = [fit for fit in fits if fit.fits is not None]
    if as_json:
        rows = [
            {"fits": fit.fits and fit.fits.to_dict(), "beyond": fit.beyond and fit.beyond.to_dict()} for fit in fits
        ]
        write_json({"base": base, "machine": machine.to_dict(), "memory": limit, "settings": rows})
        return
    columns = ("method", "weights", "recompute", "length", "batch", "total", "tokens/s", "next batch", "would need")
    cells = []
    for fit in fits:
        shown = fit.fits or fit.beyond
        assert shown is not None, "a batch either fits or does not"
        beyond = (
            ["–", "–"] if fit.beyond is None else [f"{fit.beyond.setting.batch:,}", told_bytes(fit.beyond.memory.total)]
        )
        fit_cells = (
            ["none", "–", "–"]
            if fit.fits is None
            else [f"{shown.setting.batch:,}", told_bytes(shown.memory.total), _speed(shown)]
        )
        setting = shown.setting
        kept = "yes" if setting.checkpointing else "no"
        cells.append([shown.method, setting.weights, kept, f"{setting.length:,}", *fit_cells, *beyond])
    show_table(
        f"Training on {base} within {told_bytes(limit)}",
        columns,
        cells,
        numbers=columns[3:],
        whole=columns[:3],
        lesser=("would need", "next batch"),
    )
    show_text("recompute: activations, by --gradient-checkpointing.")
    if not fitting:
        show_text("Nothing fits: give a smaller base, or shorter rows with --max-length.")
    show_text(_footnote(machine))


def _speed(plan: Plan) -> str:
    from inlay.sizes import told_rate

    speed = plan.tokens_per_second
    return "–" if speed is None else told_rate(speed)


def _footnote(machine: Machine) -> str:
    from inlay.sizes import told_age, told_bytes

    how = "from its data sheet, at the shares of it that training reaches"
    if machine.age is not None:
        how = f"measured {told_age(machine.age)}" + (" (--measure does it again)" if machine.age >= 60 else "")
    return (
        f"Speed: {machine.name}, {how}. The process itself takes {told_bytes(machine.overhead_bytes)} besides, "
        "before there is a model."
    )
