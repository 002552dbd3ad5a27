"""Learning rates on record: each method's best of a few on held-out training rows, runs/quality/rates-<task>.json.

    python -m benchmarks.quality.tuning --tasks trec --methods lora dora

A short run a rate on a part of the training rows. The recipe's rate and three times it come first, and then further
steps of three while the best is at an end. Chosen is the lowest rate whose loss on other training rows is within 2 %
of the best: short runs favour high rates, and long ones do not always survive them. Test rows are never read.
Resumable.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance, read_json, write_json
from benchmarks.quality.__main__ import OUT, WORK, _where
from benchmarks.quality.tasks import TASKS, Task, settings_of

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
NEAR = 1.02
ROWS = {"trec": 2_000, "e2e": 700, "transliteration": 3_200}
STEPS = {"trec": 150, "e2e": 70, "transliteration": 60}


def search(task: Task, method: str, recipe: float, known: dict[float, float]) -> dict[float, float]:
    """Rate → loss, for the rates that were tried; `known` are not tried again."""
    tried = dict(known)
    while todo := untried(recipe, tried):
        for rate in todo:
            tried[rate] = round(try_rate(task, method, rate), 4)
    return dict(sorted(tried.items()))


def untried(recipe: float, tried: dict[float, float]) -> list[float]:
    """The rates to try next: the first two, or the neighbours of the best."""
    rates = [float(f"{recipe * factor:.2g}") for factor in FACTORS]
    at = FACTORS.index(1.0)
    if not tried:
        return rates[at : at + 2]
    best = rates.index(min(tried, key=lambda rate: tried[rate]))
    return [rates[i] for i in (best - 1, best + 1) if 0 <= i < len(rates) and rates[i] not in tried]


def chosen(tried: dict[float, float]) -> float:
    """The lowest rate that is nearly as good as the best."""
    return min(rate for rate, loss in tried.items() if loss <= NEAR * min(tried.values()))


def try_rate(task: Task, method_name: str, rate: float) -> float:
    """The loss on held-out training rows after a short run; infinite where it diverged."""
    from inlay.core.errors import UserError
    from inlay.methods import method_named
    from inlay.train import RunConfig, run

    method = method_named(method_name)
    work = WORK / f"rate-{task.name}-{method_name}"
    source = task.base()
    config = RunConfig(
        data=str(_part(task)), out=str(work), base=None if source is None else str(source), task=task.kind,
        columns=task.columns, eval_share=0.2, method=method_name, precision=task.precision,
        settings=settings_of(method_name, task, method), where=_where(task, method), steps=STEPS[task.name],
        batch_size=task.batch_size, learning_rate=rate, eval_every=STEPS[task.name], seed=0,
    )  # fmt: skip
    try:
        result = run(config, overwrite=work.exists())
    except UserError as error:
        if "diverged" in str(error):
            return float("inf")
        raise
    return result.metrics["eval_loss"]


def _part(task: Task) -> Path:
    """The first rows of a seeded draw, as a file of their own."""
    import random

    path = WORK / f"tuning-{task.name}.jsonl"
    if not path.exists():
        lines = task.files()[0].read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(random.Random(1).sample(lines, ROWS[task.name])), encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Try what the file does not hold yet, and write it after every method."""
    from inlay.core.errors import UserError
    from inlay.methods import method_named, registry

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--methods", nargs="+", choices=list(registry()), default=list(registry()))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    for name, method in itertools.product(given.tasks, given.methods):
        out = given.out / f"rates-{name}.json"
        before = read_json(out).get("rates", {}).get(method, {})
        recipe = before.get("recipe", method_named(method).recipe.learning_rate)
        known = {float(rate): loss for rate, loss in before.get("loss", {}).items()}
        if before and ("refused" in before or not untried(recipe, known)):
            continue
        began = time.process_time()
        try:
            tried = search(TASKS[name], method, recipe, known)
            entry: dict[str, Any] = {"recipe": recipe, "chosen": chosen(tried), "loss": tried}
        except UserError as error:
            entry = {"refused": str(error)[:300]}
        entry["cpu_seconds"] = round(before.get("cpu_seconds", 0.0) + time.process_time() - began, 1)
        content = read_json(out)
        content.setdefault("provenance", provenance(seeds=[0]))
        content.setdefault("settings", {"factors": FACTORS, "rows": ROWS[name], "steps": STEPS[name]})
        content.setdefault("rates", {})[method] = entry
        write_json(out, content)
        print(name, method, entry, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
