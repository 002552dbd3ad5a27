"""A training step with the trunk cache against PEFT's with `layers_to_transform`, from the second epoch on.

    python -m benchmarks.trunk              the 135 M shape of the notes, top 8 of 30 layers
    python -m benchmarks.trunk --small      a shape for a quick look

Both train LoRA of rank 8 on all linear layers of the upper blocks, on the same weights and batch. The cache is filled
before the first step, as `inlay train` does it; `fill` is what that costs for the batch, once.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

import inlay
from benchmarks.contenders import Shape
from benchmarks.timing import alternate
from inlay import LoRA
from inlay.kernels import trunk

NOTES = Shape(hidden=576, intermediate=1536, layers=30, heads=9, vocabulary=49_152)
SMALL = Shape(hidden=256, intermediate=704, layers=12, heads=4, vocabulary=8_192)
TARGET = 0.25
RATE = 1e-4
LINEAR = [*(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))]  # with layers, PEFT wants names


def contenders(shape: Shape, top: int, batch: dict[str, Tensor]) -> tuple[dict[str, Any], float]:
    """Steps of inlay with and without the cache and of PEFT, and the seconds of filling the cache."""
    from peft import LoraConfig, get_peft_model

    layers = list(range(shape.layers - top, shape.layers))
    base = shape.build()
    base.config.use_cache = False
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=LINEAR, layers_to_transform=layers))
    adapter = inlay.attach(base, LoRA(rank=8), where="all-linear", layers=layers)
    cut = trunk.find_cut(base, adapter, batch)
    trunk.open_cut(base, cut)
    began = time.perf_counter()
    states = trunk.states_of(base, cut, {k: v for k, v in batch.items() if k != "labels"})
    fill = time.perf_counter() - began
    ours = torch.optim.AdamW(list(adapter.parameters()), lr=RATE)
    peer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=RATE)

    def step(model: Any, optimizer: Any) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def cached() -> float:
        with trunk.replaying(cut, states):
            return step(base, ours)

    return {"cached": cached, "whole": lambda: step(base, ours), "peft": lambda: step(theirs, peer)}, fill


def main(arguments: list[str] | None = None) -> int:
    """Print the ratios as JSON; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--top", type=int, default=8)
    given = parser.parse_args(arguments)
    shape = SMALL if given.small else NOTES
    torch.manual_seed(0)
    ids = torch.randint(5, shape.vocabulary, (4, 256))
    labels = ids.clone()
    labels[:, : int(256 * 0.75)] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    steps, fill = contenders(shape, given.top, batch)
    timed = alternate(steps, runs=given.runs)
    ratio = timed["cached"].median / timed["peft"].median
    report = {
        "step / PEFT's": round(ratio, 3),
        "without the cache / PEFT's": round(timed["whole"].median / timed["peft"].median, 3),
        "target": TARGET,
        "fill_ms": round(fill * 1e3, 1),
        "timings": {name: timing.to_dict() for name, timing in timed.items()},
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return int(ratio > TARGET)


if __name__ == "__main__":
    sys.exit(main())
