"""LoRA configurations trained together on one base, against one after another and against side by side.

    python -m benchmarks.together                          eight configurations on real rows, the embedded base
    python -m benchmarks.together --base PATH --data F     on other rows and another base

Each way runs in processes of its own, as commands do, so that start-up, loading and tokenising count and peaks of
memory are their own. `One after another` is a process a run, as a shell's loop has it; what as many of these need at
the same time is the sum of their peaks, with which the memory of together is compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.provenance import ROOT, peak_memory_mib
from benchmarks.realdata import e2e_as_jsonl
from benchmarks.report import Options, Part, Row, table

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RANKS = (4, 16)
TIME, MEMORY = 0.9, 0.25  # at most


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained: ranks by rates."""

    data: str
    base: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    runs: int = 8
    steps: int = 20

    def configurations(self, out: Path) -> list[dict[str, Any]]:
        """Plain configurations."""
        common = {
            "data": self.data, "base": self.base, "columns": dict(self.columns), "steps": self.steps, "batch_size": 8,
            "eval_share": 0.0,
        }  # fmt: skip
        return [
            {**common, "out": str(out / f"{rank}-{rate}"), "settings": {"rank": rank}, "learning_rate": rate}
            for rank in RANKS
            for rate in RATES
        ][: self.runs]


def measure(options: Options) -> Part:
    """The rows of `make bench`: real rows of E2E on the embedded base."""
    with tempfile.TemporaryDirectory() as folder:
        data, _ = e2e_as_jsonl(Path(folder), rows=400, meanings=1, seed=0)
        small = options.tiny or options.quick
        columns = (("prompt", "mr"), ("completion", "ref"))
        return compare(Job(data=str(data), columns=columns, runs=2 if small else 8, steps=3 if small else 20))


def compare(job: Job) -> Part:
    """Train them alone, then together; losses must be the same to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        alone = [_process([one]) for one in job.configurations(Path(folder) / "alone")]
        together = _process(job.configurations(Path(folder) / "together"))
    spent, peaks = (sum(each[what] for each in alone) for what in ("seconds", "peak_mib"))
    one = max(each["peak_mib"] for each in alone)
    what = f"{job.runs} LoRA configurations together, {job.steps} steps each"
    part = Part(raw={"alone": alone, "together": together})
    part.rows = [
        Row(
            work=f"{what}: peak memory / that of all at once",
            value=together["peak_mib"] / peaks,
            most=MEMORY,
            detail=f"{together['peak_mib']:.0f} MiB; one alone at most {one:.0f} MiB; processes, whole",
        ),
        Row(
            work=f"{what}: time / one after another",
            value=together["seconds"] / spent,
            most=TIME,
            detail=f"{together['seconds']:.3g} s, {spent:.3g} s; processes, whole; one measurement",
        ),
    ]
    if together["losses"] != [each["losses"][0] for each in alone]:
        part.wrong.append(f"{what}: losses {together['losses']}, alone {[each['losses'][0] for each in alone]}")
    return part


def _process(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds, peak and losses of a process."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "benchmarks.together", "--child", json.dumps(configs)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[1:3])} ended with {done.returncode}: {done.stderr[-2000:]}")
    passed, found = time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1])
    seconds = found["processor_seconds"] if timing.counts_processor_time() else passed
    return {"seconds": seconds, "peak_mib": found["peak_mib"], "losses": found["losses"]}


def child(text: str) -> None:
    """Train what a list of configurations says and tell the peak of memory; called in a process of its own."""
    from inlay.train import RunConfig, run
    from inlay.train.several import run_together

    configs = [RunConfig.of(values) for values in json.loads(text)]
    results = run_together(configs) if len(configs) > 1 else [run(configs[0], progress=False)]
    told = {
        "peak_mib": peak_memory_mib(),
        "processor_seconds": time.process_time(),
        "losses": [r.metrics["train_loss"] for r in results],
    }
    sys.stdout.write("\n" + json.dumps(told) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Print the rows; 1 where a target is missed or a loss differs."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="transformers folder; default: the embedded base")
    parser.add_argument("--data", help="rows with columns that need no names; default: a sample of E2E")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        child(given.child)
        return 0
    if given.data is None:
        part = measure(Options(runs=1))
    else:
        part = compare(Job(data=given.data, base=given.base, runs=given.runs, steps=given.steps))
    Console().print(table(part.rows), *part.wrong)
    return int(bool(part.wrong) or not all(row.met for row in part.rows))


if __name__ == "__main__":
    sys.exit(main())
