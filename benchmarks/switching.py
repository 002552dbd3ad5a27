"""Changing the active adapter with many of them loaded.

inlay binds a choice to the calling context; PEFT visits every adapted layer. What is timed changes nothing
else:

    to another adapter     inlay: entering and leaving `use(model, name)`; PEFT: `set_adapter(name)`
    to the base and back   inlay: entering and leaving `use(model, None)`; PEFT: `with
    model.disable_adapter()`
"""

from __future__ import annotations

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
from benchmarks.timing import alternate, ratio
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
