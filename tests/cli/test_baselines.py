"""Baselines through the commands that adapters go through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": f"{word} {n}", "label": word} for n in range(15) for word in ("red", "blue")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("features", ["classifier=logistic", "pooling=mean"]),
        ("in-context", ["k=3", "strategy=balanced"]),
        ("prompt-text", ["instruction=Which colour?"]),
    ],
)
def test_trained_and_evaluated(
    command: Command, base: Path, labelled: Path, tmp_path: Path, method: str, settings: list[str]
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    out = tmp_path / "run"
    shared = ("--base", base, "--data", labelled)
    code, told, err = command("train", *shared, "--method", method, *words, "--out", out, "--json")
    assert code == 0, err
    result = json.loads(told)
    assert result["trainable"] == 0 and "eval_accuracy" in result["metrics"]
    file = tmp_path / "answers.jsonl"
    words = ["evaluate", *map(str, shared), "--adapter", str(out / "adapter"), "--predictions", str(file)]
    code, told, err = command(*words, "--json")
    assert code == 0, err
    found = json.loads(told)
    assert set(found["metrics"]) == {"accuracy", "macro_f1", "matthews"} and found["rows"] == 30
    assert len(file.read_text().splitlines()) == 30
    assert ("demonstrations" in found) == (method == "in-context")
    code, told, _ = command(*words)
    assert code == 0 and "accuracy" in told
    code, _, err = command("merge", "--base", base, "--adapter", out / "adapter", "--out", tmp_path / "m")
    assert code == 2 and "is a baseline, not an adapter" in err
    code, _, err = command("train", *shared, "--method", method, "--out", out)
    assert code == 2 and "already in use" in err
    assert command("train", "--method", method, "--out", out, "--resume")[0] == 0


def test_mistakes_are_said(command: Command, base: Path, labelled: Path, tmp_path: Path) -> None:
    words = ("train", "--base", base, "--data", labelled, "--out", tmp_path / "run")
    for more, told in {
        ("--method", "features", "--set", "poling=mean"): "did you mean 'pooling'",
        ("--method", "in-context", "--set", "k=many"): "k='many' is not a whole number",
        ("--method", "feature"): "unknown method 'feature'; did you mean 'features'",
        ("--method", "in-contxt", "--set", "k=3"): "did you mean 'in-context'",
        ("--method", "in-context", "--on-long", "truncate"): "on_long is 'truncate', expected error",
        ("--method", "features", "--epochs", "3"): "epochs is given, but nothing is trained",
    }.items():
        code, _, err = command(*words, *more)
        assert code == 2 and told in err
    assert not (tmp_path / "run").exists()
