"""inlay against Hugging Face PEFT: training step, switching adapters, mixed batches.

    python -m benchmarks.peft_comparison                     everything, into runs/bench/peft_comparison.json
    python -m benchmarks.peft_comparison --only step --runs 9

Both run in one process, alternately, on copies of the same weights with the same adapter values, batch and
seed. First the results must agree (losses of the first twenty steps, logits); where they do not, the command
fails.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import mixed, step, switching
from benchmarks.contenders import LINEARS_112, LLAMA_58M, LLAMA_135M, Shape
from benchmarks.provenance import ROOT, provenance, write_json
from benchmarks.timing import MINIMUM_RUNS
from inlay import IA3, DoRA, Pfeiffer, PrefixTuning, PromptTuning
from inlay.core.method import Method

OUT = ROOT / "runs" / "bench" / "peft_comparison.json"
PARTS = ("step", "switch", "mixed")
TINY = Shape(hidden=64, intermediate=172, layers=2, heads=4, vocabulary=512)


def step_cases(*, tiny: bool) -> list[step.Case]:
    """The rows of the table with their targets; a smoke run takes the same cases on a tiny model.

    AdapterHub's `adapters` pins an older transformers, so bottlenecks are held against the floor only.
    """
    half = step.Case(name="no dropout, half the positions labelled", shape=LLAMA_58M)
    cases = [
        half,
        replace(half, name="dropout 0.05, half the positions labelled", dropout=0.05, at_most={"inlay/peft": 0.45}),
        replace(
            half,
            name="no dropout, every position labelled",
            labelled=1.0,
            at_most={"inlay/peft": 0.75, "inlay/floor": 0.95},
        ),
        replace(
            half,
            name="float32, no dropout, every position labelled",
            shape=replace(LLAMA_58M, dtype=torch.float32),
            labelled=1.0,
            at_most={"inlay/peft": 0.85},
        ),
        replace(
            half,
            name="135 M, r16, a quarter labelled",
            shape=LLAMA_135M,
            rank=16,
            rows=2,
            tokens=128,
            labelled=0.25,
            at_most={"inlay/peft": 0.5},
        ),
    ]
    others: list[tuple[Method, str | None]] = [
        (DoRA(rank=8, alpha=16), "all-linear"),
        (IA3(), None),
        (PrefixTuning(length=20), None),
        (PromptTuning(length=20), None),
    ]
    small = replace(half, shape=replace(LLAMA_58M, layers=4), at_most={"inlay/peft": 0.8})
    cases += [replace(small, name=f"{m.name}, 4 layers, half labelled", method=m, where=where) for m, where in others]
    cases.append(
        replace(small, name="pfeiffer, 4 layers, half labelled", method=Pfeiffer(), where=None, peer=False, at_most={})
    )
    if not tiny:
        return cases
    return [replace(c, shape=replace(TINY, dtype=c.shape.dtype), tokens=32, checked=3, at_most={}) for c in cases]


def measure(parts: list[str], *, runs: int, tiny: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """The results of the chosen parts, by name."""
    found: dict[str, Any] = {}
    if "step" in parts:
        found["step"] = []
        for case in step_cases(tiny=tiny):
            say(f"training step: {case.name}")
            found["step"].append(step.compare(case, runs=runs))
        say("activations kept for the backward pass")
        kept = step.Case(name="LoRA r8, 4 layers", shape=TINY if tiny else replace(LLAMA_58M, layers=4))
        found["activations"] = [
            step.activations(replace(kept, dropout=share), most=1.1 if not tiny else 9.0) for share in (0.0, 0.05)
        ]
    if "switch" in parts:
        say("switching adapters")
        shape = replace(LINEARS_112, layers=2) if tiny else LINEARS_112
        found["switch"] = switching.compare(adapters=3 if tiny else 20, shape=shape, runs=runs)
        say("attaching adapters")
        found["attach"] = switching.compare_attaching(adapters=3 if tiny else 20, shape=shape, runs=runs)
    if "mixed" in parts:
        say("mixed batches")
        load = mixed.Load(shape=TINY, rows=4, prompt=8, steps=2) if tiny else mixed.Load()
        found["mixed"] = mixed.compare(load, counts=(1, 2, 4) if tiny else (1, 8, 32), runs=runs)
        say("mixed batches of five methods")
        found["methods"] = mixed.compare_methods(replace(load, rows=5) if tiny else load, runs=runs)
    return found


def disagreements(found: dict[str, Any]) -> list[str]:
    """What inlay and PEFT computed differently, in words; empty when the timings compare like with like."""
    checks = {f"step, {r['case']}": r["losses"] for r in found.get("step", [])}
    if "switch" in found:
        checks["switch"] = found["switch"]["outputs"]
    checks |= {f"mixed, {r['adapters']} adapters": r["logits"] for r in found.get("mixed", {}).get("results", [])}
    if "methods" in found:
        checks["mixed, five methods"] = found["methods"]["logits"]
    return [f"{name}: {check}" for name, check in checks.items() if not check["agree"]]


def missed(found: dict[str, Any]) -> list[str]:
    """The targets that were not met, in words."""
    rows = [("step", r) for r in found.get("step", [])] + [("activations", r) for r in found.get("activations", [])]
    return [
        f"{what}, {row['case']}: {name} is {value:.3g}, at most {row['at_most'][name]:g}"
        for what, row in rows
        for name, value in row["missed"].items()
    ]


def table(found: dict[str, Any]) -> Table:
    """Medians in milliseconds and the ratios."""
    shown = Table(title="inlay and Hugging Face PEFT, alternately in one process")
    shown.add_column("work")
    for title in ("inlay ms", "PEFT ms", "base or floor ms", "inlay / PEFT", "inlay / base or floor"):
        shown.add_column(title, justify="right")
    for row in found.get("step", []):
        _add(shown, f"step: {row['case']}", row["timings"], row["ratios"], "floor")
    for row in found.get("activations", []):
        theirs = row["ratios"]["peft/floor"]
        words = f"activations kept, {row['case']}, dropout {row['method']['dropout']} (PEFT / floor {theirs})"
        shown.add_row(words, "", "", "", "", f"{row['ratios']['inlay/floor']:.3g}")
    if "switch" in found:
        for key, words in (
            ("to_another", "to another adapter"),
            ("to_base_and_back", "to the base and back"),
        ):
            ratios = {"inlay/peft": found["switch"]["ratios"][f"{key}: inlay/peft"]}
            words = f"switch {words}, {found['switch']['adapters']} loaded, {found['switch']['layers']} layers"
            _add(shown, words, found["switch"][key], ratios, "")
    if "attach" in found:
        for which in ("first", "last"):
            ratios = {"inlay/peft": found["attach"]["ratios"][f"{which}: inlay/peft"]}
            words = f"attach the {which} of {found['attach']['adapters']}"
            if which == "last":
                ours, theirs = (found["attach"]["ratios"][f"{n}: last/first"]["of_medians"] for n in ("inlay", "peft"))
                words += f" (last / first: {ours:.3g}, PEFT {theirs:.3g})"
            _add(shown, words, found["attach"][which], ratios, "")
    for row in found.get("mixed", {}).get("results", []):
        for what in ("prefill", "decode"):
            ratios = {k.removeprefix(f"{what}: "): v for k, v in row["ratios"].items() if k.startswith(what)}
            words = f"{what}: {found['mixed']['rows']} rows, {row['adapters']} adapters"
            _add(shown, words, row[what], ratios, "base")
    if "methods" in found:
        for what in ("prefill", "decode"):
            ratios = {"inlay/base": found["methods"]["ratios"][f"{what}: inlay/base"]}
            words = f"{what}: {found['methods']['adapters']} adapters of {len(found['methods']['methods'])} methods"
            _add(shown, words, found["methods"][what], ratios, "base")
    return shown


def _add(shown: Table, words: str, timings: dict[str, Any], ratios: dict[str, Any], reference: str) -> None:
    def median(name: str) -> str:
        return f"{timings[name]['median_ms']:.4g}" if name in timings else ""

    def quotient(name: str) -> str:
        return f"{ratios[name]['of_medians']:.3g}" if name in ratios else ""

    medians = [median(name) for name in ("inlay", "peft", reference)]
    shown.add_row(words, *medians, quotient("inlay/peft"), quotient(f"inlay/{reference}"))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 where inlay and PEFT disagree or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--runs", type=int, default=9, help=f"alternating runs; results want {MINIMUM_RUNS} or more")
    parser.add_argument("--threads", type=int, help="torch threads; the default is torch's own")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: checks that everything runs, times nothing")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's use of transformers
    console = Console()
    about = provenance(seeds=[0, 1])
    found = measure(given.only, runs=given.runs, tiny=given.smoke, say=lambda words: console.print(f"… {words}"))
    wrong = disagreements(found)
    write_json(
        given.out,
        {"provenance": about, "runs": given.runs, "smoke": given.smoke, "agree": not wrong, **found},
    )
    console.print(table(found))
    for line in wrong:
        console.print(f"[red]inlay and PEFT disagree[/red] {line}")
    short = missed(found)
    for line in short:
        console.print(f"[red]target missed[/red] {line}")
    console.print(f"written to {given.out}")
    return 1 if wrong or short else 0


if __name__ == "__main__":
    sys.exit(main())
