"""inlay against Hugging Face PEFT and other peers: every figure of `make bench` with its target.

    python -m benchmarks.peft_comparison                     everything, into runs/bench/peft_comparison.json
    python -m benchmarks.peft_comparison --only lora trunk   some sections; into the file only with --out
    python -m benchmarks.peft_comparison --quick --cpu-time  ratios while the machine does other work

Contenders run alternately in one process, on copies of the same weights with the same adapter values, batch and seed.
Each of several sections has a process of its own, because what one leaves in memory made the next one's peer up to 30 %
faster; what concerns a whole process (start-up, peaks of memory, runs together) is measured in further ones. The
results must agree first (losses of the first twenty steps, logits). The command fails where they do not, or where a
target is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import epochs, peaks, serving, startup, steps, timing, together, trunk, without_bf16
from benchmarks.provenance import ROOT, provenance, write_json
from benchmarks.report import Options, Part, Row, table
from benchmarks.timing import MINIMUM_RUNS

OUT = ROOT / "runs" / "bench" / "peft_comparison.json"
SECTIONS: dict[str, Callable[[Options], Part]] = {
    "startup": startup.measure,
    "together": together.measure,
    "peaks": peaks.measure,
    "batches": serving.batches,
    "switches": serving.switches,
    "lora": steps.lora,
    "without_bf16": without_bf16.measure,
    "notes": steps.notes,
    "methods": steps.methods,
    "activations": steps.activations,
    "trunk": trunk.measure,
    "e2e": epochs.e2e,
    "trec": epochs.trec,
}
LIBRARIES = ["benchmarks.serving", "peft", "transformers.models.llama.modeling_llama", "transformers.trainer"]


def measure(section: str, options: Options) -> dict[str, Any]:
    """What a section found: its rows of the table, where results disagree, its seconds, and everything measured."""
    began = time.perf_counter()
    part = SECTIONS[section](options)
    return {
        "table": [row.to_dict() for row in part.rows],
        "disagreements": part.wrong,
        "seconds": {section: round(time.perf_counter() - began, 1)},
        "sections": {section: part.raw},
    }


def apart(sections: list[str], options: Options, prepare: Callable[[], None]) -> dict[str, Any]:
    """The same of several sections, each measured in a process of its own.

    The processes are forks of one that has imported the libraries and computed nothing, which saves their start.

    Args:
        prepare: what each does first.
    """
    whole: dict[str, Any] = {"table": [], "disagreements": [], "seconds": {}, "sections": {}}
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(LIBRARIES)
    for name in sections:
        options.say(f"… {name}")
        began = time.perf_counter()
        with ProcessPoolExecutor(1, mp_context=forks, initializer=prepare) as process:
            found = process.submit(measure, name, options).result()
        found["seconds"][name] = round(time.perf_counter() - began, 1)  # its start included
        for what, each in whole.items():
            if isinstance(each, list):
                each.extend(found[what])
            else:
                each.update(found[what])
        ratios = (f"{row['found']:.3g} (at most {row['at_most']:g})" for row in found["table"] if row["at_most"])
        options.say(f"  {found['seconds'][name]:.0f} s: {'; '.join(ratios)}")
    return whole


def prepare(threads: int | None, cpu_time: bool) -> None:
    """Set what holds for a whole process."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's use of transformers
    if threads:
        torch.set_num_threads(threads)
    if cpu_time:
        timing.count_processor_time()


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 where ours and a peer's results disagree or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to measure; default: all")
    parser.add_argument("--runs", type=int, default=7, help=f"alternating runs; results want {MINIMUM_RUNS} or more")
    parser.add_argument("--quick", action="store_true", help="three runs, four checked steps: for a look")
    parser.add_argument("--cpu-time", action="store_true", help="time what the process computes: for a busy machine")
    parser.add_argument("--threads", type=int, help="torch threads; the default is torch's own")
    parser.add_argument(
        "--out", type=Path, help=f"default: {OUT.relative_to(ROOT)} where everything is measured in full"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: checks that everything runs, times nothing")
    given = parser.parse_args(arguments)
    ready = partial(prepare, given.threads, given.cpu_time)
    ready()
    about = provenance(seeds=[0, 1], packages=["trl"])
    few = given.quick or given.smoke
    runs, sections = 3 if few else given.runs, given.only or list(SECTIONS)
    options = Options(runs=runs, checked=4 if few else 20, tiny=given.smoke, quick=few, say=partial(print, flush=True))
    known = measure(sections[0], options) if len(sections) == 1 else apart(sections, options, ready)
    out = given.out or (None if few or given.only or given.cpu_time else OUT)
    if out:
        write_json(out, {"provenance": about, "runs": runs, **known})
    console = Console()
    console.print(table([Row.of(row) for row in known["table"]]))
    for words in known["disagreements"]:
        console.print(f"[red]results disagree[/red] {words}")
    console.print(f"{sum(known['seconds'].values()):.0f} s" + (f", written to {out}" if out else ""))
    return int(bool(known["disagreements"]) or not all(row["met"] for row in known["table"]))


if __name__ == "__main__":
    sys.exit(main())
