"""Changing the active adapter with many of them loaded, and adding one more.

inlay binds a choice to the calling context; PEFT visits every adapted layer. What is timed changes nothing
else:

    to another adapter     inlay: entering and leaving `use(model, name)`; PEFT: `set_adapter(name)`
    to the base and back   inlay: entering and leaving `use(model, None)`; PEFT: `with
    model.disable_adapter()`

Adding: the last of several adapters, in ratio to the first on the bare model; PEFT: `add_adapter`, in ratio to
`get_peft_model`.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch

import inlay
from benchmarks.contenders import (
    LINEARS_112,
    Shape,
    copy_values,
    randomise,
    token_rows,
    with_inlay,
    with_peft,
)
from benchmarks.timing import Timing, alternate, now, ratio
from inlay import LoRA

REPEAT = 200  # calls a run of inlay's; a single one is too short for the clock
TOLERANCE = 1e-4


def compare(*, adapters: int = 20, shape: Shape = LINEARS_112, runs: int) -> dict[str, Any]:
    """Check that both serve the adapter that was asked for, then time the two kinds of switch."""
    names = [f"a{n}" for n in range(adapters)]
    base = shape.build().eval()
    ours, theirs = with_inlay(base, LoRA(rank=8), names, seed=0), with_peft(base, LoRA(rank=8), names)
    randomise(ours, seed=1)
    copy_values(ours, theirs)
    agreement = _same_adapter_served(ours, theirs, names, token_rows(shape, 2, 8))
    to_another = alternate(
        {"inlay": _use(ours, names), "peft": _set_adapter(theirs, names)}, runs=runs, repeat={"inlay": REPEAT}
    )
    to_base = alternate({"inlay": _use(ours, [None]), "peft": _disable(theirs)}, runs=runs, repeat={"inlay": REPEAT})
    return {
        "shape": shape.to_dict(),
        "adapters": adapters,
        "layers": sum(1 for _ in next(iter(inlay.adapters(ours).values())).modules()),
        "outputs": agreement,
        "to_another": {name: t.to_dict() for name, t in to_another.items()},
        "to_base_and_back": {name: t.to_dict() for name, t in to_base.items()},
        "ratios": {
            "to_another: inlay/peft": ratio(to_another["inlay"], to_another["peft"]),
            "to_base_and_back: inlay/peft": ratio(to_base["inlay"], to_base["peft"]),
        },
    }


def compare_attaching(*, adapters: int = 20, shape: Shape = LINEARS_112, runs: int) -> dict[str, Any]:
    """The time of attaching the first and the last of `adapters`, on a fresh copy of the model each run."""
    import peft

    method = LoRA(rank=8)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    base = shape.build().eval()
    seconds: dict[str, list[list[float]]] = {"inlay": [], "peft": []}
    for turn in range(1 + runs):  # the first warms up
        ours, theirs, wrapped = copy.deepcopy(base), copy.deepcopy(base), None
        spent: dict[str, list[float]] = {"inlay": [], "peft": []}
        gc.collect()
        for number in range(adapters):
            began = now()
            inlay.attach(ours, method, name=f"a{number}", where="all-linear")
            middle = now()
            if wrapped is None:
                wrapped = peft.get_peft_model(theirs, config, adapter_name=f"a{number}")
            else:
                wrapped.add_adapter(f"a{number}", config)
            spent["inlay"].append(middle - began)
            spent["peft"].append(now() - middle)
        for name, each in spent.items():
            seconds[name] += [each] if turn else []
    first = {name: Timing(tuple(each[0] for each in runs_)) for name, runs_ in seconds.items()}
    last = {name: Timing(tuple(each[-1] for each in runs_)) for name, runs_ in seconds.items()}
    return {
        "shape": shape.to_dict(),
        "adapters": adapters,
        "first": {name: t.to_dict() for name, t in first.items()},
        "last": {name: t.to_dict() for name, t in last.items()},
        "ratios": {
            "inlay: last/first": ratio(last["inlay"], first["inlay"]),
            "peft: last/first": ratio(last["peft"], first["peft"]),
            "first: inlay/peft": ratio(first["inlay"], first["peft"]),
            "last: inlay/peft": ratio(last["inlay"], last["peft"]),
        },
    }


def _use(model: Any, names: list[Any]) -> Callable[[], None]:
    turn = itertools.cycle(names)

    def switch() -> None:
        with inlay.use(model, next(turn)):
            pass

    return switch


def _set_adapter(model: Any, names: list[str]) -> Callable[[], None]:
    turn = itertools.cycle(names)
    return lambda: model.set_adapter(next(turn))


def _disable(model: Any) -> Callable[[], None]:
    def switch() -> None:
        with model.disable_adapter():
            pass

    return switch


def _same_adapter_served(ours: Any, theirs: Any, names: list[str], ids: torch.Tensor) -> dict[str, Any]:
    worst, apart = 0.0, []
    with torch.no_grad():
        with inlay.use(ours, None):
            plain = ours(ids).logits
        for name in (names[0], names[-1]):
            theirs.set_adapter(name)
            with inlay.use(ours, name):
                mine = ours(ids).logits
            worst = max(worst, float((mine - theirs(ids).logits).abs().max()))
            apart.append(float((mine - plain).abs().max()))
    return {
        "worst_difference_between_the_two": worst,
        "smallest_effect_of_an_adapter": min(apart),
        "tolerance": TOLERANCE,
        "agree": worst <= TOLERANCE < min(apart),
    }
