"""`--compile` in whole runs: the numbers of a run without it, what it cost, and what it cannot be combined with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.core.errors import ConfigError, UnsupportedError
from inlay.kernels import compiled
from inlay.train import run
from inlay.train.compiling import Compilation
from inlay.train.running import RunResult
from inlay.train.several import run_together
from tests import tiny
from tests.unit.train.test_run import config, metrics


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is traced and differentiated as ever; only machine code is not made."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that draws no random numbers."""
    return tiny.llama(tmp_path_factory.mktemp("base") / "llama", dropout=0.0)


def test_the_numbers_of_a_run_without_it(
    completions: Path, steady: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = run(config(completions, steady, tmp_path / "a", packing=False), progress=False)
    ours = run(config(completions, steady, tmp_path / "b", compile=True), progress=True)
    for one, other in zip(metrics(ours), metrics(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert plain.compiled is None and ours.compiled is not None
    assert ours.compiled["layers"] == 2 and ours.compiled["seconds"] > 0
    assert "compiled 2 layers in" in capfd.readouterr().err
    assert RunResult.read(ours.out / "result.json") == ours


@pytest.mark.exhaustive
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
def test_machine_code(completions: Path, steady: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    plain = run(config(completions, steady, tmp_path / "a", packing=False), progress=False)
    ours = run(config(completions, steady, tmp_path / "b", compile=True), progress=False)
    for one, other in zip(metrics(ours), metrics(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_layers_that_compute_something_else_are_noticed(
    completions: Path, steady: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *given: tuple(
            t * 1.5 if isinstance(t, torch.Tensor) and t.dim() == 3 and t.is_floating_point() else t
            for t in graph(*given)
        )

    monkeypatch.setattr(compiled, "BACKEND", wrong)
    with pytest.raises(UnsupportedError, match="do not compute the same as the model"):
        run(config(completions, steady, tmp_path / "run", compile=True), progress=False)


def test_a_compiler_that_fails_is_an_error_of_ours(
    completions: Path, steady: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    with pytest.raises(UnsupportedError, match="no compiler here"):
        run(config(completions, steady, tmp_path / "run", compile=True), progress=False)


def test_what_it_cannot_be_combined_with(completions: Path, steady: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="packing and gradient_checkpointing"):
        config(completions, steady, tmp_path / "run", compile=True, packing=True, gradient_checkpointing=True)
    several = [config(completions, steady, tmp_path / name, compile=True) for name in "ab"]
    with pytest.raises(ConfigError, match="several runs at once"):
        run_together(several)


def test_the_break_even_is_told() -> None:
    cost: dict[str, Any] = {"layers": 8, "seconds": 41.0, "pass_before": 1.2, "pass_after": 1.0}
    assert "has paid after 205 steps of 300" in Compilation(**cost, steps=205).told(300)
    assert "would have paid after 205 steps of 20" in Compilation(**cost, steps=205).told(20)
    assert "does not pay" in Compilation(**cost, steps=None).told(300)
