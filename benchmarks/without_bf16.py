"""A processor without bf16 instructions (AVX2 only): most laptops, most cloud machines. Everything in fp32.

Measured in a process whose libraries are told to use no newer instructions, so that any machine gives these rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import mixed, steps, timing
from benchmarks.contenders import LLAMA_58M
from benchmarks.provenance import ROOT
from benchmarks.report import Options, Part, Row, milliseconds

ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
LORA = {"inlay/peer": 0.5, "inlay/floor": 0.68}
DECODE = 1.8  # times the base alone
SHAPE = replace(LLAMA_58M, dtype=torch.float32)


def measure(options: Options) -> Part:
    """The rows, from a process of their own."""
    words = ["--runs", str(options.runs), "--checked", str(options.checked), "--threads", str(torch.get_num_threads())]
    words += [f"--{name}" for name in ("tiny", "quick") if getattr(options, name)]
    words += ["--cpu-time"] if timing.counts_processor_time() else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.without_bf16", *words, "--out", str(out)]
        subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=ROOT, check=True)
        found = json.loads(out.read_text(encoding="utf-8"))
    return Part(rows=[Row(**row) for row in found["rows"]], wrong=found["wrong"], raw=found["raw"])


def here(options: Options) -> Part:
    """The same in this process."""
    case = replace(steps.LORA, name=f"no bf16: {steps.LORA.name}, fp32", shape=SHAPE, at_most=LORA)
    part = steps.all_contests([steps.Contest(case=case, floor=True)], options)
    load = mixed.Load(shape=replace(steps.TINY, dtype=torch.float32), rows=5, prompt=8, steps=2)
    load = load if options.tiny else mixed.Load(shape=SHAPE)
    found = mixed.compare(load, counts=(load.rows,), runs=options.runs)
    result = found["results"][0]
    part.raw.append(found)
    part.rows.append(
        Row(
            work=f"no bf16: decode of {load.rows} rows with {load.rows} adapters / base alone, fp32",
            value=result["ratios"]["decode: inlay/base"]["of_medians"],
            most=DECODE,
            detail=milliseconds(result["decode"]),
        )
    )
    if not result["logits"]["agree"]:
        part.wrong.append(f"mixed batch without bf16: {result['logits']}")
    return part


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("runs", "checked", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("tiny", "quick", "cpu-time"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.cpu_time:
        timing.count_processor_time()
    say: Callable[[str], None] = partial(print, flush=True)
    part = here(Options(runs=given.runs, checked=given.checked, tiny=given.tiny, quick=given.quick, say=say))
    raw: dict[str, Any] = {"capability": torch.backends.cpu.get_cpu_capability(), "found": part.raw}
    written = {"rows": [asdict(row) for row in part.rows], "wrong": part.wrong, "raw": raw}
    given.out.write_text(json.dumps(written), encoding="utf-8")


if __name__ == "__main__":
    main()
