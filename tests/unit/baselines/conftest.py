"""Tiny bases, labelled rows that depend on a word, and a way to run a baseline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inlay.baselines.running import run
from inlay.train.config import RunConfig
from inlay.train.running import RunResult
from tests import tiny

Fit = Callable[..., RunResult]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"llama": tiny.llama(folder / "llama"), "bert": tiny.bert(folder / "bert"), "t5": tiny.t5(folder / "t5")}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty rows of three labels."""
    path = tmp_path_factory.mktemp("data") / "labelled.jsonl"
    rows = tiny.rows("classification", 60, seed=1)
    for row in rows:
        row["label"] = "cat" if "cat" in row["text"] else "dog" if "dog" in row["text"] else "neither"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "completions.jsonl", count=30)


@pytest.fixture
def fit(bases: dict[str, Path], tmp_path: Path) -> Fit:
    """Runs a baseline: ``fit("llama", data, "features", {"classifier": "forest"})``."""
    count = 0

    def made(base: str, data: Path, method: str, settings: dict[str, Any] | None = None, **more: Any) -> RunResult:
        nonlocal count
        count += 1
        values = {"out": str(tmp_path / f"run{count}"), "data": str(data), "base": str(bases[base]), "method": method}
        return run(RunConfig.of({**values, "settings": settings or {}, **more}), progress=False)

    return made
