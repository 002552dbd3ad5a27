"""Start-up, each time in a process of its own: `inlay --help`, `import inlay`, `inlay train` to its first step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.realdata import e2e_as_jsonl
from benchmarks.report import Options, Part, Row
from benchmarks.timing import Timing

MAIN = "from inlay.cli.main import main; main()"  # what the installed command runs
HELP, IMPORT, FIRST_STEP = 0.3, 0.05, 6.0  # seconds, at most
ROWS = 500
POLL = 0.005


def measure(options: Options) -> Part:
    """Medians over processes; the last row's data are real rows of E2E."""
    with tempfile.TemporaryDirectory() as folder:
        data, _ = e2e_as_jsonl(Path(folder), rows=ROWS, meanings=1, seed=0)
        found = {
            "nothing": _times(options.runs, lambda _: _whole(["-c", "pass"])),
            "import": _times(options.runs, lambda _: _whole(["-c", "import inlay"])),
            "help": _times(options.runs, lambda _: _whole(["-c", MAIN, "--help"])),
            "first_step": _times(options.runs, lambda n: _first_step(data, Path(folder) / f"run-{n}")),
        }
    bare = found["nothing"].median
    imported = found["import"].median - bare
    return Part(
        raw={name: each.to_dict() for name, each in found.items()},
        rows=[
            Row(work="`inlay --help`", value=found["help"].median, most=HELP, unit="s", detail="a process, whole"),
            Row(work="`import inlay`", value=imported, most=IMPORT, unit="s",
                detail=f"a process less a bare Python's {bare:.3f} s"),
            Row(work="`inlay train`, embedded base, command to end of first step", value=found["first_step"].median,
                most=FIRST_STEP, unit="s", detail=f"{ROWS} E2E rows, 16 a step; until its line in metrics.jsonl"),
        ],
    )  # fmt: skip


def _times(runs: int, once: Callable[[int], float]) -> Timing:
    once(-1)  # files come into the page cache
    return Timing(tuple(once(number) for number in range(runs)))


def _whole(words: list[str]) -> float:
    """Seconds of a Python process from its start to its end."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return used.ru_utime + used.ru_stime if timing.counts_processor_time() else seconds


def _first_step(data: Path, out: Path) -> float:
    """Seconds until the run has written its first step's line."""
    words = ["train", "--data", str(data), "--columns", "prompt=mr,completion=ref", "--out", str(out), "--steps", "1"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lines = out / "metrics.jsonl"
    while not (stepped := lines.exists() and lines.stat().st_size > 0) and process.poll() is None:
        time.sleep(POLL)
    seconds = _processor_seconds(process) if timing.counts_processor_time() else time.perf_counter() - began
    process.kill()  # what it does afterwards is nobody's matter here
    _, told = process.communicate()
    if not stepped:
        raise RuntimeError(f"`inlay {' '.join(words)}` ended with {process.returncode}: {told}")
    return seconds


def _processor_seconds(process: subprocess.Popen[Any]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
