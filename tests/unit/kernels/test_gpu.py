"""Kernels for GPUs without a GPU: against their twins in Triton's interpreter, and through Triton's compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from inlay.kernels import gpu

HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)")


def run(*arguments: str, interpreted: bool, cache: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: Triton reads what it is to do when it is imported."""
    file = str(HERE / "interpreted.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", file, interpreted=True, cache=tmp_path)


@needs_triton
@pytest.mark.exhaustive
def test_compiled_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter runs may still be nothing that a GPU does."""
    run("-W", "ignore", str(HERE / "compiled.py"), interpreted=False, cache=tmp_path)


@needs_triton
@pytest.mark.exhaustive
def test_every_line_of_the_measurements_runs(tmp_path: Path) -> None:
    out = tmp_path / "smoke.json"
    run("-m", "benchmarks.gpu", "--smoke", "--out", str(out), interpreted=False, cache=tmp_path)
    found = json.loads(out.read_text())["results"]
    assert list(found) == ["kernels", "step_with_dropout", "step_without", "serving", "compiled"]
    assert all(part["agree"] for part in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    from benchmarks.gpu import main

    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_what_takes_too_long_is_left_out() -> None:
    pytest.importorskip("peft")
    from benchmarks.gpu import SMOKE, measure

    said: list[str] = []
    assert all("left_out" in part for part in measure(SMOKE, latest_s=-1, say=said.append).values())


def test_a_cpu_has_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not gpu.serves(torch.empty(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.serves(torch.empty(1)) == (find_spec("triton") is not None)
    assert not gpu.serves(torch.empty(1, device="meta"))
