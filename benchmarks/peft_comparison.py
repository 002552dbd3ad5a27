"""inlay against Hugging Face PEFT and other peers: every figure of `make bench` with its target.

    python -m benchmarks.peft_comparison                     everything, into runs/bench/peft_comparison.json
    python -m benchmarks.peft_comparison --only lora trunk   some sections; into the file only with --out
    python -m benchmarks.peft_comparison --quick --cpu-time  ratios while the machine does other work

Contenders run alternately in one process, on copies of the same weights with the same adapter values, batch and seed.
Every section has a process of its own, because what one leaves in memory made the next one's peer up to 30 % faster;
what concerns a whole process (start-up, peaks of memory, runs together) is measured in further ones. The results must
agree first (losses of the first twenty steps, logits). The command fails where they do not, or where a target is
missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import epochs, peaks, serving, startup, steps, timing, together, trunk
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
    "notes": steps.notes,
    "methods": steps.methods,
    "activations": steps.activations,
    "trunk": trunk.measure,
    "e2e": epochs.e2e,
    "trec": epochs.trec,
}


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


def apart(sections: list[str], arguments: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """The same of several sections, each measured by this command in a process of its own.

    Args:
        arguments: the command's own but for the sections and the results file.
        say: told which section is at work.
    """
    whole: dict[str, Any] = {"table": [], "disagreements": [], "seconds": {}, "sections": {}}
    for name in sections:
        say(f"… {name}")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            words = ["-m", "benchmarks.peft_comparison", *arguments, "--only", name, "--out", str(out)]
            began = time.perf_counter()
            done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
            if not out.exists():
                raise RuntimeError(f"python {' '.join(words)} ended with {done.returncode} and no result")
            found = json.loads(out.read_text(encoding="utf-8"))
        found["seconds"][name] = round(time.perf_counter() - began, 1)  # its start included
        for what, each in whole.items():
            if isinstance(each, list):
                each.extend(found[what])
            else:
                each.update(found[what])
        ratios = (f"{row['found']:.3g} (at most {row['at_most']:g})" for row in found["table"] if row["at_most"])
        say(f"  {found['seconds'][name]:.0f} s: {'; '.join(ratios)}")
    return whole


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
    runs, sections = 3 if few else given.runs, given.only or list(SECTIONS)
    if len(sections) == 1:
        checked = 4 if few else 20
        options = Options(runs=runs, checked=checked, tiny=given.smoke, quick=few, say=console.print)
        known = measure(sections[0], options)
    else:
        known = apart(sections, _shared(given), console.print)
    out = given.out or (None if few or given.only or given.cpu_time else OUT)
    if out:
        write_json(out, {"provenance": about, "runs": runs, **known})
    console.print(table([Row.of(row) for row in known["table"]]))
    for words in known["disagreements"]:
        console.print(f"[red]results disagree[/red] {words}")
    console.print(f"{sum(known['seconds'].values()):.0f} s" + (f", written to {out}" if out else ""))
    return int(bool(known["disagreements"]) or not all(row["met"] for row in known["table"]))


def _shared(given: argparse.Namespace) -> list[str]:
    """The command's switches that every section gets."""
    switches = [f"--{name}" for name in ("quick", "cpu-time", "smoke") if getattr(given, name.replace("-", "_"))]
    return [*switches, "--runs", str(given.runs), *(["--threads", str(given.threads)] if given.threads else [])]


if __name__ == "__main__":
    sys.exit(main())
