"""Tables of docs/quality.md from runs/quality: every method on four tasks, and the rates that were tried."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "runs" / "quality"
TASKS = {"trec": "accuracy", "sst2": "accuracy", "e2e": "bleu", "transliteration": "exact_match"}
PERCENT = ("accuracy", "exact_match", "rougeL")
CLASSIFYING = ("trec", "sst2")
JUDGE = "full"
SMALL, NEAR = 0.03, 1.0  # share of the base's parameters; points

Row = dict[str, Any]


def results(task: str) -> dict[str, list[Row]]:
    """Method → what was measured on a task, a dictionary a seed; failed ones left out."""
    path = RESULTS / f"{task}.json"
    if not path.exists():
        return {}
    found: dict[str, list[Row]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["results"].values():
        found.setdefault(row["method"], [])
        if "failed" not in row:
            found[row["method"]].append(row)
    return found


def in_points(rows: list[Row], metric: str) -> list[float]:
    return [row[metric] * (100 if metric in PERCENT else 1) for row in rows]


def scores_table() -> str:
    """Scores with their spread over seeds, best on TREC first."""
    by_task = {task: results(task) for task in TASKS}
    header = [
        "method", "share", "TREC", "SST-2", "E2E BLEU", "E2E ROUGE-L", "transliteration", "CPU s", "peak MiB",
        "rates",
    ]  # fmt: skip
    methods = dict.fromkeys(m for found in by_task.values() for m in found)
    first = by_task["trec"]
    order = sorted(methods, key=lambda m: -statistics.mean(in_points(first[m], "accuracy")) if first.get(m) else 0)
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for method in order:
        measured = {task: found.get(method, []) for task, found in by_task.items()}
        some = measured["trec"] or next((rows for rows in measured.values() if rows), [])
        share = some[0].get("share") if some else None
        used = dict.fromkeys(
            f"{rows[0]['learning_rate']:g}" for rows in measured.values() if rows and "learning_rate" in rows[0]
        )
        lines.append([
            f"`{method}`", "–" if share is None else f"{share:.2%}",
            cell(measured["trec"], "accuracy"), cell(measured["sst2"], "accuracy"),
            cell(measured["e2e"], "bleu"), cell(measured["e2e"], "rougeL"),
            cell(measured["transliteration"], "exact_match"),
            number(measured["trec"], "cpu_seconds"), number(measured["trec"], "peak_memory_mib"), ", ".join(used),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(rows: list[Row], metric: str) -> str:
    """Mean and, of several seeds, the distance from the worst to the best."""
    if not rows:
        return "–"
    values = in_points(rows, metric)
    spread = f" ({max(values) - min(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def number(rows: list[Row], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return f"{statistics.mean(values):,.0f}" if values else "–"


def near_table() -> str:
    """Which methods come near full fine-tuning with few parameters, by the seeds that each has with it."""
    lines = []
    for task in CLASSIFYING:
        found = results(task)
        full = {row["seed"]: row for row in found.pop(JUDGE, [])}
        behind: dict[str, tuple[float, int]] = {}  # points, seeds
        for method, rows in found.items():
            both = [row for row in rows if row["seed"] in full and 0 < row.get("share", 0) < SMALL]
            if both:
                mean = statistics.mean(in_points(both, "accuracy"))
                judge = statistics.mean(in_points([full[row["seed"]] for row in both], "accuracy"))
                behind[method] = judge - mean, len(both)
        near = sorted((gap, -seeds, method) for method, (gap, seeds) in behind.items() if gap <= NEAR)
        listed = ", ".join(f"`{method}` {round(-gap, 1) + 0.0:+.1f} ({-less})" for gap, less, method in near) or "none"
        lines.append(f"- **{task}**, points from full fine-tuning (seeds): {len(near)} methods: {listed}.")
    return "\n".join(lines)


def rates_table() -> str:
    """Loss on held-out training rows at every rate that was tried."""
    lines = ["| method | base | loss at each rate | chosen |", "| --- | --- | --- | ---: |"]
    for task, base in {
        "trec": "MiniLM-L6 (TREC)",
        "e2e": "embedded base (E2E)",
        "transliteration": "transliteration",
    }.items():
        path = RESULTS / f"rates-{task}.json"
        if not path.exists():
            continue
        for method, entry in json.loads(path.read_text(encoding="utf-8"))["rates"].items():
            tried = ", ".join(f"{float(rate):g}: {loss:.3f}" for rate, loss in entry.get("loss", {}).items())
            lines.append(f"| `{method}` | {base} | {tried or entry['refused']} | {entry.get('chosen', '–')} |")
    return "\n".join(lines)
