"""The table of docs/speed.md, from runs/bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "runs" / "bench" / "peft_comparison.json"


def speed_table() -> str:
    """Every row of `make bench` with its target, and on what it was measured."""
    content: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    about = content["provenance"]
    hardware, versions = about["hardware"], about["versions"]
    lines = ["| work | at most | found | met | in detail |", "| --- | ---: | ---: | :-: | --- |"]
    for row in content["table"]:
        unit = f" {row['unit']}" if row["unit"] else ""
        most = "" if row["at_most"] is None else f"{row['at_most']:g}{unit}"
        met = "yes" if row["met"] else "**no**"
        lines.append(f"| {row['work']} | {most} | {row['found']:.3g}{unit} | {met} | {row['detail']} |")
    told = f"{hardware['processor']}, {hardware['torch_threads']} threads, {hardware['memory_gib']} GiB"
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl"))
    took = sum(content["seconds"].values())
    lines += [
        "",
        f"Commit {about['git']['commit'][:7]}, {about['date'][:10]}; {told}; {packages}; {took:.0f} s in all.",
    ]
    return "\n".join(lines)
