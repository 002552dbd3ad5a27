"""LoRA configurations trained together on one base, against one after another and against side by side.

    python -m benchmarks.together --base PATH --data rows.jsonl      eight configurations

Each way runs in processes of its own, so that peaks of memory are its own. `one after another` is a process a run, as
a shell's loop has it; what eight of these need at the same time is the sum of their peaks, with which the memory of
together is compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RANKS = (4, 16)
TIME, MEMORY = 0.9, 0.25  # at most


def configurations(given: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Plain configurations: ranks by rates."""
    common = {"data": given.data, "steps": given.steps, "batch_size": 8, "eval_share": 0.0}
    common |= {} if given.base is None else {"base": given.base}
    return [
        {**common, "out": str(out / f"{rank}-{rate}"), "settings": {"rank": rank}, "learning_rate": rate}
        for rank in RANKS
        for rate in RATES
    ][: given.runs]


def child(text: str) -> None:
    """Train what a list of configurations says and tell the peak of memory; called in a process of its own."""
    from inlay.train import RunConfig, run
    from inlay.train.several import run_together

    configs = [RunConfig.of(values) for values in json.loads(text)]
    results = run_together(configs) if len(configs) > 1 else [run(configs[0], progress=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write("\n" + json.dumps({"peak_mib": peak, "losses": [r.metrics["train_loss"] for r in results]}))


def measured(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds, peak and losses of a process."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "benchmarks.together", "--child", json.dumps(configs)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return {"seconds": time.perf_counter() - began, **json.loads(done.stdout.splitlines()[-1])}


def main(arguments: list[str] | None = None) -> int:
    """Print the ratios as JSON; 1 where a target is missed or a loss differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base")
    parser.add_argument("--data")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        child(given.child)
        return 0
    if given.data is None:
        parser.error("--data is missing: give a file of rows")
    with tempfile.TemporaryDirectory() as folder:
        alone = [measured([one]) for one in configurations(given, Path(folder) / "alone")]
        together = measured(configurations(given, Path(folder) / "together"))
    spent, peaks = sum(a["seconds"] for a in alone), sum(a["peak_mib"] for a in alone)
    report = {
        "time: together / one after another": round(together["seconds"] / spent, 3),
        "peak memory: together / all at once": round(together["peak_mib"] / peaks, 3),
        "peak memory: together / one": round(together["peak_mib"] / max(a["peak_mib"] for a in alone), 3),
        "targets": {"time": TIME, "memory": MEMORY},
        "same losses": together["losses"] == [a["losses"][0] for a in alone],
        "runs": given.runs,
        "steps": given.steps,
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    met = together["seconds"] <= TIME * spent and together["peak_mib"] <= MEMORY * peaks
    return int(not (met and report["same losses"]))


if __name__ == "__main__":
    sys.exit(main())
