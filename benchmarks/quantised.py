"""QLoRA against Hugging Face PEFT with bitsandbytes: a training step's time and its peak of memory.

    python -m benchmarks.quantised [--runs 7]

The same NF4 base (double quantisation, blocks of 64, bf16), the same LoRA (rank 8, all linears, equal values), batch
and optimizer. Two peers: `peft` attaches to the base as it is; `peft-prepared` calls `prepare_model_for_kbit_training`
first, as PEFT's guide to QLoRA does, which makes embeddings, norms and head float32.

Losses of the first steps are compared first. Time: all in one process, a step of each in turns; wall-clock, and the
processor's own, which other processes disturb less. Memory: a process each, the highest resident size in three steps
(`VmHWM`, set back before them) and what it is above the size before them. Results: runs/quantised/peft.json. Exits
with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Shape, copy_values, token_rows, trained, with_inlay
from benchmarks.provenance import ROOT, provenance, write_json
from benchmarks.step import agreement
from inlay import LoRA

OUT = ROOT / "runs" / "quantised" / "peft.json"
SHAPE = Shape(hidden=768, intermediate=2048, layers=8, heads=12, vocabulary=16_384)
METHOD = LoRA(rank=8, alpha=16)
ROWS, TOKENS = 4, 256
CHECKED = 10  # steps whose losses are compared
# Relative; bf16 beside float32 rounds norms, head and update otherwise.
TOLERANCE = {"peft": 5e-4, "peft-prepared": 1e-3}
AT_MOST = {"time": 0.8, "memory": 1.0}
STEPS = 3  # over which the peak of memory is taken


def base(shape: Shape) -> Any:
    """A random Llama in NF4, frozen."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from inlay.bases.loading import read_quantised

    logging.disable_progress_bar()
    dense = shape.build()
    made = read_quantised(AutoModelForCausalLM, dense.config, dict(dense.state_dict()), "nf4", shape.dtype)[0]
    return made.train().requires_grad_(False)


def inlay_model(shape: Shape) -> Any:
    return with_inlay(base(shape), METHOD, ["default"], seed=0)


def peft_model(shape: Shape, *, prepared: bool) -> Any:
    """PEFT's, with inlay's values."""
    import peft

    model = base(shape)
    if prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(r=METHOD.rank, lora_alpha=METHOD.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, config)
    copy_values(inlay_model(shape), made)
    return made.train()


CONTENDERS: dict[str, Callable[[Shape], Any]] = {
    "inlay": inlay_model,
    "peft": lambda shape: peft_model(shape, prepared=False),
    "peft-prepared": lambda shape: peft_model(shape, prepared=True),
}


@dataclass
class Stepping:
    """One contender's steps.

    Attributes:
        wall, cpu: seconds of every step that was timed.
    """

    model: Any
    batch: dict[str, torch.Tensor]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(trained(self.model), lr=1e-3, weight_decay=0.0)

    def step(self) -> float:
        """Zeroing, forward, backward and AdamW's step; returns the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**self.batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def timed(self) -> None:
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        self.step()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def stepping(name: str, shape: Shape, rows: int, tokens: int) -> Stepping:
    """A contender on rows whose first half is a prompt."""
    ids = token_rows(shape, rows, tokens)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return Stepping(CONTENDERS[name](shape), {"input_ids": ids, "labels": labels})


def compare(shape: Shape, *, rows: int, tokens: int, runs: int, checked: int) -> dict[str, Any]:
    """Losses, then times in turns."""
    contenders = {name: stepping(name, shape, rows, tokens) for name in CONTENDERS}
    losses = {name: [c.step() for _ in range(checked)] for name, c in contenders.items()}
    for turn in range(runs):
        for name in sorted(contenders, reverse=turn % 2 == 1):
            contenders[name].timed()
    ours = contenders["inlay"]
    found = {}
    for name, peer in contenders.items():
        if name != "inlay":
            found[name] = {
                "losses": agreement(losses["inlay"], losses[name], TOLERANCE[name]),
                "ratio": ratio(ours.wall, peer.wall),
                "ratio_of_processor_time": ratio(ours.cpu, peer.cpu),
            }
    seconds = {name: {"wall": c.wall, "processor": c.cpu} for name, c in contenders.items()}
    return {"against": found, "seconds": seconds}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times as long ours takes: of the medians, and the extremes of the single rounds."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "of_medians": round(statistics.median(ours) / statistics.median(theirs), 4),
        "lowest_round": round(min(rounds), 4),
        "highest_round": round(max(rounds), 4),
    }


def peaks() -> dict[str, dict[str, int]]:
    """Each contender's memory, a process each."""
    found = {}
    for name in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.quantised", "--peak-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_of(name: str, shape: Shape, rows: int, tokens: int) -> dict[str, int]:
    """Resident bytes of this process before training, and at most while it trains."""
    contender = stepping(name, shape, rows, tokens)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(STEPS):
        contender.step()
    peak = resident("VmHWM")
    return {"before": before, "peak": peak, "above": peak - before}


def resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def missed(found: dict[str, Any]) -> list[str]:
    """What falls short: losses that differ, a target of time against either peer, of memory against the smaller."""
    wrong = []
    for name, peer in found["against"].items():
        if not peer["losses"]["agree"]:
            wrong.append(f"losses differ from {name} by {peer['losses']['worst_relative_difference']:.2e}")
        if peer["ratio"]["of_medians"] > AT_MOST["time"]:
            wrong.append(f"a step takes {peer['ratio']['of_medians']} of {name}'s, target {AT_MOST['time']}")
    for name, peer in found["memory_ratio"].items():
        if max(peer.values()) > AT_MOST["memory"]:
            wrong.append(f"memory is {peer} of {name}'s, target {AT_MOST['memory']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--peak-of", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak_of:
        print(json.dumps(peak_of(asked.peak_of, SHAPE, ROWS, TOKENS)))
        return 0
    memory = peaks()
    ours = memory["inlay"]
    shares = {n: {k: round(ours[k] / m[k], 4) for k in ("peak", "above")} for n, m in memory.items() if n != "inlay"}
    found = {
        "setting": {
            "shape": SHAPE.to_dict(), "method": METHOD.to_dict(), "batch": [ROWS, TOKENS], "labelled": 0.5,
            "quantisation": "nf4, double",
        },
        **compare(SHAPE, rows=ROWS, tokens=TOKENS, runs=asked.runs, checked=CHECKED),
        "memory_bytes": memory,
        "memory_ratio": shares,
        "at_most": AT_MOST,
    }  # fmt: skip
    found["missed"] = missed(found)
    write_json(asked.out, found | {"provenance": provenance(seeds=[SHAPE.seed], packages=["bitsandbytes"])})
    for name, peer in found["against"].items():
        wall, processor = (peer[key]["of_medians"] for key in ("ratio", "ratio_of_processor_time"))
        print(f"{name}: step {wall} (processor's time {processor}), memory {shares[name]}, "
              f"losses within {peer['losses']['worst_relative_difference']:.1e}")  # fmt: skip
    print("\n".join(found["missed"]) or "every target is met")
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
