"""inlay against Hugging Face PEFT and other peers: every figure of `make bench` with its target.

    python -m benchmarks.peft_comparison                     everything, into runs/bench/peft_comparison.json
    python -m benchmarks.peft_comparison --only lora trunk   some sections; into the file only with --out
    python -m benchmarks.peft_comparison --quick --cpu-time  ratios while the machine does other work

Contenders run alternately in one process, on copies of the same weights with the same adapter values, batch and seed;
what concerns a whole process (start-up, peaks of memory, runs together) is measured in processes of its own. The
results must agree first (losses of the first twenty steps, logits). The command fails where they do not, or where a
target is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import epochs, peaks, serving, startup, steps, timing, together, trunk
from benchmarks.provenance import ROOT, provenance, write_json
from benchmarks.report import Options, Part, table
from benchmarks.timing import MINIMUM_RUNS

OUT = ROOT / "runs" / "bench" / "peft_comparison.json"
SECTIONS: dict[str, Callable[[Options], Part]] = {
    "startup": startup.measure,  # first: nothing else is in memory yet
    "together": together.measure,
    "peaks": peaks.measure,  # in processes of their own until here; what others leave behind slows many small products
    "batches": serving.batches,
    "switches": serving.switches,
    "lora": steps.lora,
    "notes": steps.notes,
    "methods": steps.methods,
    "activations": steps.activations,
    "trunk": trunk.measure,
    "e2e": epochs.e2e,
    "trec": epochs.trec,
}


def measure(sections: list[str], options: Options, say: Callable[[str], None]) -> dict[str, tuple[Part, float]]:
    """What each section found, and its seconds."""
    found = {}
    for name in sections:
        say(f"… {name}")
        began = time.perf_counter()
        part = SECTIONS[name](options)
        found[name] = part, round(time.perf_counter() - began, 1)
        say(
            f"  {found[name][1]:.0f} s: "
            + "; ".join(f"{row.value:.3g} (at most {row.most:g})" for row in part.rows if row.most)
        )
    return found


def content(found: dict[str, tuple[Part, float]]) -> dict[str, Any]:
    """For the results file: the table first, then everything."""
    parts = {name: part for name, (part, _) in found.items()}
    return {
        "table": [row.to_dict() for part in parts.values() for row in part.rows],
        "disagreements": [words for part in parts.values() for words in part.wrong],
        "seconds": {name: seconds for name, (_, seconds) in found.items()},
        "sections": {name: part.raw for name, part in parts.items()},
    }


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
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.cpu_time:
        timing.count_processor_time()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's use of transformers
    console = Console()
    about = provenance(seeds=[0, 1], packages=["trl"])
    few = given.quick or given.smoke
    options = Options(
        runs=3 if few else given.runs, checked=4 if few else 20, tiny=given.smoke, quick=few, say=console.print
    )
    found = measure(given.only or list(SECTIONS), options, console.print)
    known = content(found)
    out = given.out or (None if few or given.only or given.cpu_time else OUT)
    if out:
        write_json(out, {"provenance": about, "runs": options.runs, **known})
    console.print(table([row for part, _ in found.values() for row in part.rows]))
    for words in known["disagreements"]:
        console.print(f"[red]results disagree[/red] {words}")
    console.print(f"{sum(known['seconds'].values()):.0f} s" + (f", written to {out}" if out else ""))
    return int(bool(known["disagreements"]) or not all(row["met"] for row in known["table"]))


if __name__ == "__main__":
    sys.exit(main())
