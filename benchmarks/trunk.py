"""A training step with the trunk cache against PEFT's with `layers_to_transform`, from the second epoch on.

    python -m benchmarks.trunk              the 135 M shape of the notes, top 8 of 30 layers
    python -m benchmarks.trunk --small      a shape for a quick look

Both train LoRA of rank 8 on all linear layers of the upper blocks, from the same values, on the same weights and batch.
The cache is filled before the first step, as `inlay train` does it; `fill` is what that costs for the batch, once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import inlay
from benchmarks import step
from benchmarks.contenders import LLAMA_135M, Shape, in_peft
from benchmarks.report import Options, Part, Row, milliseconds, table
from benchmarks.steps import WARMUP, agreed, recorded, take_on
from benchmarks.timing import alternate, now, ratio
from inlay import LoRA
from inlay.kernels import trunk

SMALL = Shape(hidden=256, intermediate=704, layers=12, heads=4, vocabulary=8_192)
TARGET = 0.25
TOP = 8


def measure(options: Options) -> Part:
    """The row of `make bench`."""
    return compare(SMALL if options.tiny else LLAMA_135M, TOP, options)


def compare(shape: Shape, top: int, options: Options) -> Part:
    """Steps of inlay with the cache and of PEFT, alternately; their losses must agree."""
    case = step.Case(name="", shape=shape, labelled=0.25, tokens=32 if options.tiny else 256)
    batch = {**case.batch(), "attention_mask": torch.ones(case.rows, case.tokens, dtype=torch.long)}
    ours, theirs, serving, fill = contenders(shape, top, batch)
    take = step.training_step(ours, batch)

    def cached() -> Tensor:
        with serving():
            return take()

    losses: dict[str, list[float]] = {"inlay": [], "peer": []}
    steps = {
        "inlay": recorded(cached, losses["inlay"]),
        "peer": recorded(step.training_step(theirs, batch), losses["peer"]),
    }
    timings = alternate(steps, runs=options.runs, warmup=WARMUP)
    take_on(steps, losses, options.checked)
    found = {name: timing.to_dict() for name, timing in timings.items()}
    check = agreed(losses, options, shape)
    work = f"top {top} of {shape.layers} layers with the trunk cache, from the second epoch: step / PEFT's"
    quotient = ratio(timings["inlay"], timings["peer"])
    row = Row(
        work=work, value=quotient["of_medians"], most=TARGET,
        detail=f"{milliseconds(found)}; filling it, once, {fill * 1e3:.3g} ms",
    )  # fmt: skip
    wrong = [] if check["agree"] else [f"{work}, losses: {check}"]
    return Part([row], wrong, {"losses": check, "timings": found, "ratio": quotient, "fill_ms": fill * 1e3})


def contenders(shape: Shape, top: int, batch: dict[str, Tensor]) -> tuple[Any, Any, Callable[[], Any], float]:
    """Our model, PEFT's, what serves kept states to ours, and the seconds of filling the cache."""
    base = shape.build().train()
    base.config.use_cache = False
    torch.manual_seed(0)
    model = shape.build().train()
    model.config.use_cache = False
    layers = list(range(shape.layers - top, shape.layers))
    adapter = inlay.attach(model, LoRA(rank=8, alpha=16), where="all-linear", layers=layers)
    theirs = in_peft(model, base)
    cut = trunk.find_cut(model, adapter, batch)
    trunk.open_cut(model, cut)
    began = now()
    states = trunk.states_of(model, cut, {k: v for k, v in batch.items() if k != "labels"})
    return model, theirs, lambda: trunk.replaying(cut, states), now() - began


def main(arguments: list[str] | None = None) -> int:
    """Print the row; 1 where the target is missed."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--top", type=int, default=TOP)
    given = parser.parse_args(arguments)
    part = compare(SMALL if given.small else LLAMA_135M, given.top, Options(runs=given.runs))
    Console().print(table(part.rows), *part.wrong)
    return int(bool(part.wrong) or not part.rows[0].met)


if __name__ == "__main__":
    sys.exit(main())
