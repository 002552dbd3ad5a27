from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from inlay.cli.demo import METRICS, RECIPES, share_of_the_way


def test_share_of_the_way() -> None:
    assert share_of_the_way(0.1, 0.7, 0.9) == pytest.approx(0.75)
    assert share_of_the_way(4.0, 1.0, 0.0) == pytest.approx(0.75)
    assert share_of_the_way(0.5, 0.7, 0.5) is None


@pytest.mark.slow
def test_the_demo_runs_and_can_be_run_again(
    command: Callable[..., tuple[int, str, str]], base: Path, tmp_path: Path
) -> None:
    words = ("demo", "--base", base, "--out", tmp_path / "demo", "--rows", 20, "--epochs", 1)
    code, out, err = command(*words, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts == json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [row["model"] for row in facts["models"]] == ["base", *RECIPES]
    assert all(set(row["metrics"]) == set(METRICS) for row in facts["models"])
    assert facts["models"][1]["trained"] < facts["models"][2]["trained"]
    assert (tmp_path / "demo" / "lora" / "adapter" / "adapter.safetensors").is_file()
    code, out, err = command(*words)
    assert code == 0, err
    assert "of the way" in out and "inlay generate --adapter" in out
