"""The README.md beside a fitted baseline."""

from __future__ import annotations

from typing import Any

from inlay.baselines.baseline import Baseline
from inlay.formats.provenance import shown
from inlay.train.card import table
from inlay.train.config import RunConfig
from inlay.train.record import TrainingRecord


def card(
    config: RunConfig, baseline: Baseline, record: TrainingRecord, facts: dict[str, Any], metrics: dict[str, float]
) -> str:
    """The card's text.

    Args:
        facts: ``rows, eval_rows, parameters, seconds``.
    """
    base = "embedded" if config.base is None else shown(config.base)
    words = "" if config.base is None else f"--base {base if base == config.base else f'path/to/{base}'} "
    learnt = f", {facts['parameters']:,} parameters learnt beside it" if facts["parameters"] else ""
    settings = [(key, f"`{value!r}`") for key, value in baseline.to_dict().items() if key != "method"]
    return "\n".join(
        [
            "---",
            "library_name: inlay",
            f"tags: [inlay, {baseline.name}, {record.task}]",
            "---",
            "",
            f"# {baseline.name} for {record.task}",
            "",
            f"A baseline fitted by inlay: {type(baseline).__name__} "
            f"({baseline.paper}). No parameter of the base is trained{learnt}.",
            "",
            table(
                ("", ""),
                [
                    ("Base", f"`{base}`"),
                    ("Data", f"`{shown(config.data)}` ({facts['rows']:,} rows)"),
                    ("Held out", f"{facts['eval_rows']:,} rows"),
                    ("Seconds", f"{facts['seconds']:,.1f}"),
                ],
            ),
            "",
            "## Results",
            "",
            table(("score", "value"), [(name.replace("_", " "), f"{value:.4f}") for name, value in metrics.items()]),
            "",
            "## Method",
            "",
            table(("hyper-parameter", "value"), settings),
            "",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in record.versions.items()) + ".",
            "",
            "## Use",
            "",
            "```console",
            f"$ inlay evaluate {words}--adapter . --data rows.jsonl",
            "```",
            "",
        ]
    )
