"""The memory that a run will need, printed before its first step, with a warning if there is not enough."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from inlay.sizes import told_bytes

if TYPE_CHECKING:
    from inlay.plan import Plan
    from inlay.train.prepare import Prepared


BYTES = 12  # for each value that enters or leaves a layer: three times in float32
STATES = 16  # bytes for each trained value: itself, its gradient, and AdamW's two moments
ROOM = 2  # times the ceiling must be free for it to be all that is said


def foresee(prepared: Prepared) -> str | None:
    """One line with the plan of a prepared run, and a second one if it will not fit; None if it cannot be planned.

    If far more memory is free than any step could need, tracing a step would only delay the run, and the line has an
    upper bound instead.
    """
    room = free_bytes()
    most = ceiling(prepared)
    if room is not None and most is not None and ROOM * most <= room:
        return f"plan: less than {told_bytes(most)} on top of the base; {told_bytes(room)} are free"
    try:
        plan = plan_of(prepared)
    except Exception:  # a plan is optional: if it fails, the run must start all the same
        return None
    memory = plan.memory
    parts = ", ".join(
        f"{role} {told_bytes(value)}"
        for role, value in (("weights", memory.weights), ("activations", memory.activations), ("scores", memory.logits))
    )
    line = f"plan: {told_bytes(memory.total)} at the worst moment of a step ({parts})"
    needed = memory.total - memory.weights  # the base is loaded already
    if room is None or needed <= room:
        return line
    return (
        f"{line}\nwarning: {told_bytes(needed)} are still needed, but {told_bytes(room)} are free. Lower --batch-size "
        "and raise --accumulate, or give --gradient-checkpointing or a smaller --max-length"
    )


def ceiling(prepared: Prepared) -> int | None:
    """An upper bound of the bytes a step needs on top of the base; None if the model's attention heads are unknown.

    It counts the input and output of each matrix for each token, the scores of every attention head twice, and the
    optimizer.
    """
    model, config = prepared.base.model, prepared.base.model.config.get_text_config()
    heads, layers = (getattr(config, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
    if not isinstance(heads, int) or not isinstance(layers, int):
        return None
    rows = min(prepared.config.batch_size, len(prepared.train))
    length = max(len(ids) for ids in prepared.train["input_ids"])
    around = sum(sum(p.shape[-2:]) * math.prod(p.shape[:-2]) for p in model.parameters() if p.dim() > 1)
    scores = heads * layers * length * 2  # for each token
    trained = sum(p.numel() for p in prepared.adapter.parameters())
    return int(rows * length * (around * BYTES + scores * 4) + trained * STATES)


def plan_of(prepared: Prepared) -> Plan:
    """The plan for the run's longest rows."""
    from inlay.machine.precision import precision_of
    from inlay.plan import Planner, Setting, Skeleton

    config, model = prepared.config, prepared.base.model
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
            precision=precision_of(model.dtype),
            quantisation=kept,
            checkpointing=config.gradient_checkpointing,
            batch=min(config.batch_size, len(prepared.train)),
            length=max(len(ids) for ids in prepared.train["input_ids"]),
            accumulate=config.accumulate,
        )
    )


def free_bytes() -> int | None:
    """Memory left for this process: on the device, or on the machine within the process's own limits."""
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
    """Address space left for the process; None if it is not limited."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    with open("/proc/self/statm", encoding="ascii") as line:
        return limit - int(line.read().split()[0]) * resource.getpagesize()
