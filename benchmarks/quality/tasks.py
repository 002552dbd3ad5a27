"""The four tasks: which rows, which base, how long, and what counts.

    trec             question type, six classes          MiniLM-L6 (encoder)             accuracy
    sst2             sentiment, 8,000 fixed rows         MiniLM-L6                        accuracy
    e2e              records to sentences, 2,000 rows    embedded base (decoder)          BLEU, ROUGE-L
    transliteration  Arabic names in Latin letters       real encoder–decoder, width 32   exact match, ROUGE-L

Learning rates are chosen on rows of the training (or development) files that the score never sees
(`benchmarks.quality.tuning`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT
from benchmarks.realdata import (
    e2e_as_jsonl,
    minilm,
    shared_weights,
    sst2_as_jsonl,
    transliteration_as_jsonl,
    trec_as_jsonl,
)

WORK = ROOT / "runs" / "tmp" / "quality"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        kind: ``classification``, ``causal`` or ``seq2seq``.
        files: training and test rows as JSON Lines.
        base: the base's folder; None is the embedded one.
        score: the metric by which methods are compared.
        metrics: what else is measured.
        precision: the base's type: bf16 is the faster on this hardware, and every method has the same.
        columns: where they cannot be found by name.
        where: places of the methods that adapt layers and whose papers name none for such a base.
        new_tokens: generated at most.
        rates: the task whose learning rates hold here too, where the base is the same.
        falls: the share by which the training loss falls where anything is learnt; below zero it may rise as much.
    """

    name: str
    kind: str
    files: Callable[[], tuple[Path, Path]]
    base: Callable[[], Path | None]
    score: str
    metrics: tuple[str, ...]
    epochs: float
    batch_size: int
    precision: str
    columns: dict[str, str] = field(default_factory=dict)
    where: str | None = None
    new_tokens: int = 64
    rates: str | None = None
    falls: float = 0.1


def _transliteration_base() -> Path:
    from benchmarks.quality.transliteration import convert

    return convert(shared_weights("ct2_aren_transliteration"), WORK / "transliteration-base")


def _first_and_last(paths: tuple[Path, ...]) -> tuple[Path, Path]:
    return paths[0], paths[-1]


TASKS = {
    task.name: task
    for task in (
        Task(
            name="trec", kind="classification", files=lambda: trec_as_jsonl(WORK), base=minilm, score="accuracy",
            metrics=("accuracy", "macro_f1"), epochs=2, batch_size=16, precision="bf16",
        ),
        Task(
            name="sst2", kind="classification", files=lambda: sst2_as_jsonl(WORK, rows=8_000), base=minilm,
            score="accuracy", metrics=("accuracy", "macro_f1"), epochs=1, batch_size=16, precision="bf16", rates="trec",
        ),
        Task(
            name="e2e", kind="causal", files=lambda: e2e_as_jsonl(WORK, rows=2_000, meanings=150, seed=0),
            base=lambda: None, score="bleu", metrics=("bleu", "rougeL"), epochs=1, batch_size=8, precision="bf16",
            columns={"prompt": "mr", "completion": "ref"}, where="all-linear", new_tokens=96,
        ),
        Task(
            name="transliteration", kind="seq2seq", files=lambda: _first_and_last(transliteration_as_jsonl(WORK)),
            base=_transliteration_base, score="exact_match", metrics=("exact_match", "rougeL"), epochs=1,
            batch_size=64, precision="fp32", new_tokens=40, falls=-0.1,  # the base knows this task already
        ),
    )
}  # fmt: skip


def settings_of(method: str, task: Task, method_class: Any) -> dict[str, Any]:
    """A method's hyper-parameters for a task: its own defaults, but sizes for a base this small."""
    fields = {name for name in method_class().to_dict() if name != "method"}
    narrow = task.name == "transliteration"
    wanted = SIZES.get(method, {}) | (NARROW.get(method, {}) if narrow else {})
    return {name: value for name, value in wanted.items() if name in fields}


# Paper sizes are for models ten to a thousand times as wide; these keep every method under 3 % of the base.
SIZES: dict[str, dict[str, Any]] = {
    "vera": {"rank": 256},
    "mam": {"length": 20, "size": 64},
    "top-layers": {"top": 2},
}
NARROW: dict[str, dict[str, Any]] = {
    "houlsby": {"bottleneck": 8}, "pfeiffer": {"bottleneck": 8}, "parallel": {"bottleneck": 8},
    "lora": {"rank": 4}, "mam": {"length": 8, "size": 8}, "compacter": {"reduction": 8},
}  # fmt: skip
