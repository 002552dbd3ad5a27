"""What a run will need, said before its first step; a warning where that is more than there is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.plan import Plan
    from inlay.train.prepare import Prepared


def foresee(prepared: Prepared) -> str | None:
    """One line with the plan of a prepared run, and one more where it will not fit; None where it cannot be planned."""
    from inlay.plan import told_bytes

    try:
        plan = plan_of(prepared)
    except Exception:  # a plan is a courtesy: whatever it cannot follow must not keep a run from starting
        return None
    memory, room = plan.memory, free_bytes()
    parts = ", ".join(
        f"{role} {told_bytes(value)}"
        for role, value in (("weights", memory.weights), ("activations", memory.activations), ("scores", memory.logits))
    )
    line = f"plan: {told_bytes(memory.total)} at the worst moment of a step ({parts})"
    needed = memory.total - memory.weights  # the base is there already
    if room is None or needed <= room:
        return line
    return (
        f"{line}\nwarning: {told_bytes(needed)} are still needed, but {told_bytes(room)} are free. Lower --batch-size "
        "and raise --accumulate, or give --gradient-checkpointing or a smaller --max-length"
    )


def plan_of(prepared: Prepared) -> Plan:
    """The plan for the run's longest rows."""
    from inlay.plan import Planner, Setting, Skeleton
    from inlay.plan.skeleton import DTYPES

    config, model = prepared.config, prepared.base.model
    precision = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
    skeleton = Skeleton(model.config, task=prepared.task)
    adapter = prepared.adapter
    planner = Planner(
        skeleton,
        prepared.method,
        where=adapter.places.where,
        layers=adapter.places.layers,
        modules_to_save=adapter.modules_to_save,
    )
    kept: Any = getattr(config, "quantize", None)
    return planner.plan(
        Setting(
            precision=precision,
            quantisation=kept,
            checkpointing=config.gradient_checkpointing,
            batch=min(config.batch_size, len(prepared.train)),
            length=max(len(ids) for ids in prepared.train["input_ids"]),
            accumulate=config.accumulate,
        )
    )


def free_bytes() -> int | None:
    """What is left for this process: of the device, or of the machine and of the process's own limits."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/meminfo", encoding="ascii") as lines:
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    limits = [n for n in (free, _left_in_limit()) if n is not None]
    return min(limits, default=None)


def _left_in_limit() -> int | None:
    """Of the address space that the process may use, where it is limited."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    with open("/proc/self/statm", encoding="ascii") as line:
        return limit - int(line.read().split()[0]) * resource.getpagesize()
