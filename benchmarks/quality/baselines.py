"""What fine-tuning is judged by, on the same rows: frozen features, demonstrations, an instruction alone.

Features are those of the task's own base. Demonstrations need a language model, so classification by them runs on
the embedded base. Nothing is drawn in most of them: all seeds give one score then.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import peak_memory_mib
from benchmarks.quality.tasks import WORK, Task
from benchmarks.series import Job

# Row of the table → method and settings.
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "features, CLS, logistic": ("features", {"pooling": "cls", "c": 0.01}),
    "features, mean, logistic": ("features", {"pooling": "mean", "c": 0.01}),
    "features, mean, forest": ("features", {"pooling": "mean", "classifier": "forest"}),
    "features, mean, XGBoost": ("features", {"pooling": "mean", "classifier": "xgboost", "trees": 100}),
    "in-context, 4 random": ("in-context", {"k": 4, "strategy": "random"}),
    "in-context, 4 nearest": ("in-context", {"k": 4, "strategy": "nearest"}),
    "prompt text alone": ("prompt-text", {}),
}


def baselines_for(task: Task) -> list[str]:
    """The rows that can be measured on a task."""
    languages = ("classification", "causal")
    kinds = {"features": ("classification",), "in-context": languages, "prompt-text": languages}
    return [row for row, (method, _) in BASELINES.items() if task.kind in kinds[method]]


def measure(task: Task, job: Job) -> dict[str, Any]:
    """Fit and score one."""
    from inlay.baselines.running import run
    from inlay.baselines.scoring import evaluate_folder
    from inlay.data import read_table, resolve_columns
    from inlay.train import RunConfig

    method, settings = BASELINES[job.method]
    train, test = task.files()
    own = method == "features" or task.kind != "classification"
    source: Path | None = task.base() if own else None
    work = WORK / f"{task.name}-{job.method.replace(', ', '-').replace(' ', '-')}-{job.seed}"
    config = RunConfig(
        data=str(train), out=str(work), base=None if source is None else str(source), columns=task.columns,
        eval_share=0.0, method=method, precision="fp32", settings=settings, seed=job.seed,
    )  # fmt: skip
    began, began_wall = time.process_time(), time.perf_counter()
    result = run(config, overwrite=work.exists())
    fitting = time.process_time() - began
    table = read_table(test)
    layout = resolve_columns(table, task.columns or None)
    scored = evaluate_folder(
        result.adapter, table, layout, metrics=task.metrics, batch_size=32,
        max_new_tokens=task.new_tokens if task.kind == "causal" else None,
    )  # fmt: skip
    return {
        **{name: round(scored.evaluation["metrics"][name], 4) for name in task.metrics},
        "cpu_seconds": round(fitting, 1),
        "cpu_seconds_of_evaluation": round(time.process_time() - began - fitting, 1),
        "seconds": round(time.perf_counter() - began_wall, 1),
        "peak_memory_mib": peak_memory_mib(),
        "trained_parameters": 0,
        "share": 0.0,
        "settings": settings,
        "base": "the task's" if own else "the embedded base",
    }
