"""A series of measurements, each in a process of its own, kept in one results file and resumable.

A process of its own makes peak memory that of one measurement. A result that the file already holds is not
measured again; a file whose settings, versions or machine differ from now is refused, since its numbers would
not compare.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, provenance, read_json, write_json


@dataclass(frozen=True)
class Job:
    """One measurement: a method (or the base, or a peer) and a seed."""

    method: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method} seed {self.seed}"


def run_series(
    jobs: Sequence[Job],
    *,
    out: Path,
    settings: dict[str, Any],
    command: Callable[[Job, Path], list[str]],
    fresh: bool = False,
    packages: Sequence[str] = (),
    keep_going: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure what `out` does not hold yet, and write it after every measurement.

    Args:
        settings: what all measurements share and what decides their numbers.
        command: the arguments (after ``python``) that make one measurement and write its JSON to the given
        path. fresh: start a new file instead of going on with the old one.

    Returns:
        The content of the file.

    Raises:
        SystemExit: the file was made with other settings, or a measurement failed (those before it are kept).
    """
    about = provenance(seeds=sorted({job.seed for job in jobs}), packages=packages)
    content = {} if fresh else read_json(out)
    if content:
        _same_conditions(content, settings, about, out)
    results: dict[str, Any] = content.get("results", {})
    for job in jobs:
        if job.key in results and "failed" not in results[job.key]:
            say(f"{job.key}: already in {out.name}")
            continue
        say(f"{job.key} …")
        try:
            measured = _measure(job, command)
        except SystemExit as failure:
            if not keep_going:
                raise
            measured = {"failed": str(failure)}
        results[job.key] = {"method": job.method, "seed": job.seed, **measured}
        content = {"provenance": about, "settings": settings, "results": results}
        write_json(out, content)
    return content


def _measure(job: Job, command: Callable[[Job, Path], list[str]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run([sys.executable, *command(job, report)], cwd=ROOT)
        if done.returncode != 0 or not report.exists():
            raise SystemExit(f"{job.key} failed (exit code {done.returncode}); what was measured before is kept")
        about = provenance(seeds=[job.seed])
        return {**read_json(report), "date": about["date"], "git": about["git"]}


def _same_conditions(content: dict[str, Any], settings: dict[str, Any], about: dict[str, Any], out: Path) -> None:
    old = content["provenance"]
    pairs = {
        "settings": (content["settings"], settings),
        "versions": (old["versions"], about["versions"]),
        "hardware": (_lasting(old["hardware"]), _lasting(about["hardware"])),
    }
    other = [name for name, (before, now) in pairs.items() if before != now]
    if other:
        raise SystemExit(
            f"{out} was measured with other {' and '.join(other)}, so its numbers would not compare; "
            "give --fresh to measure everything again, or another --out"
        )


def _lasting(hardware: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in hardware.items() if k != "load_average_1_minute"}
