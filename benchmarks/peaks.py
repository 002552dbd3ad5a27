"""The most memory of training steps, ours and the peer's, each in a process of its own.

    python -m benchmarks.peaks          the first row of `make bench` and every method's

Counted is what the kernel says: the most that was resident during three steps, of the whole process, which has loaded
what its contender needs and no more. What it held before it built the model (interpreter and libraries) is told too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, peak_memory_mib
from benchmarks.report import Options, Part, Row

FIRST, OTHERS = 0.6, 1.0  # times the peer's, at most
STEPS = 3
WHO = ("inlay", "peer")


def contests() -> list[Any]:
    """LoRA's first row, then the methods."""
    from benchmarks.steps import lora_contests, method_contests

    return [lora_contests()[0], *method_contests()]


def measure(options: Options) -> Part:
    """A row a case; two processes at a time, which memory does not mind."""
    cases = contests()
    jobs = [(number, who) for number in range(len(cases)) for who in WHO]
    with ThreadPoolExecutor(1 if options.quick else 2) as pool:
        found = dict(zip(jobs, pool.map(lambda job: _process(*job, tiny=options.tiny), jobs), strict=True))
    part = Part(raw=[{"case": cases[n].case.name, "who": who, **each} for (n, who), each in found.items()])
    for number, contest in enumerate(cases):
        ours, theirs = (found[number, who] for who in WHO)
        part.rows.append(
            Row(
                work=f"peak memory of a step, {contest.case.name} / {contest.named}'s",
                value=ours["process_mib"] / theirs["process_mib"],
                most=OTHERS if number else FIRST,
                detail=f"{ours['process_mib']:.0f} MiB, {theirs['process_mib']:.0f} MiB; without libraries "
                f"{ours['step_mib']:.0f}, {theirs['step_mib']:.0f}",
            )
        )
    return part


def _process(number: int, who: str, *, tiny: bool) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.peaks", "--child", str(number), who, *(["--tiny"] if tiny else [])]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes of several threads each would wait for one another
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=alone)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[1:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(number: int, who: str, *, tiny: bool) -> dict[str, float]:
    """Build one contender, take steps, and tell the peaks in MiB; called in a process of its own."""
    from benchmarks import step
    from benchmarks.contenders import with_inlay
    from benchmarks.steps import TINY

    contest = contests()[number]
    if who == "peer" and contest.named == "PEFT":
        import peft  # noqa: F401  # before the count of what the libraries take
    case = replace(contest.case, shape=TINY, tokens=32) if tiny else contest.case
    gc.collect()
    before = _resident_mib()
    base = case.shape.build().train()
    ours = with_inlay(base, case.trained, ["default"], seed=case.seed, where=case.where)
    model = ours if who == "inlay" else contest.peer(ours, base)
    model.train()
    del ours, base
    take = step.training_step(model, case.batch())
    _forget_peak()
    for _ in range(STEPS):
        take()
    peak = peak_memory_mib()
    return {"before_mib": before, "process_mib": peak, "step_mib": round(peak - before, 1)}


def _resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024, 1)


def _forget_peak() -> None:
    """Give back what is free, and let the kernel count the peak anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main(arguments: list[str] | None = None) -> int:
    """Print the rows; 1 where a target is missed."""
    from rich.console import Console

    from benchmarks.report import table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        sys.stdout.write("\n" + json.dumps(child(int(given.child[0]), given.child[1], tiny=given.tiny)) + "\n")
        return 0
    rows = measure(Options(runs=1, tiny=given.tiny)).rows
    Console().print(table(rows))
    return int(not all(row.met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
