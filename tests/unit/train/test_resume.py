"""Law 10: stop anywhere, resume, and the numbers are the same as without the stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from inlay.core.errors import BaseMismatchError, ConfigError, DataError
from inlay.train import RunConfig, RunResult, Stopped, run
from inlay.train.running import resumed_config
from tests import tiny
from tests.unit.train.test_run import config, metrics

FILE = "adapter.safetensors"


class _Killed(BaseException):
    """Stands for SIGKILL: nothing of ours handles it."""


@contextmanager
def killed_after(step: int) -> Iterator[None]:
    """End training right after a step, before anything of it is saved."""
    from inlay.train.callbacks import Pace

    whole = Pace.on_step_end

    def ending(self: Pace, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        whole(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise _Killed

    with mock.patch.object(Pace, "on_step_end", ending), pytest.raises(_Killed):
        yield


def interrupted(asked: RunConfig, *steps: int) -> RunResult:
    """The run, killed after each of `steps` and resumed."""
    for place, step in enumerate(steps):
        with killed_after(step):
            run(asked, resume=place > 0, progress=False)
    return run(asked, resume=True, progress=False)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"dropout": 0.3}),
        ("prefix-tuning", {"length": 4}),
        ("prompt-tuning", {"length": 4, "init": "random"}),
        ("houlsby", {}),
        ("full", {}),
    ],
)
def test_the_same_numbers(
    completions: Path, llama: Path, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    """Two epochs of 8 steps in passes of two; killed mid-epoch, on a checkpoint, between two, at an epoch's end."""
    asked = config(completions, llama, tmp_path / "a", method=method, settings=settings, accumulate=2, steps=None)
    asked = asked.changed(epochs=2, batch_size=2, save_every=3, eval_every=4)
    whole = run(asked, progress=False)
    again = interrupted(asked.changed(out=str(tmp_path / "b")), 2, 5, 6, 9, 14, 16)
    assert whole.steps == 16
    assert metrics(whole) == metrics(again)
    assert whole.metrics == again.metrics
    assert (whole.adapter / FILE).read_bytes() == (again.adapter / FILE).read_bytes()


def test_the_precision_stays(completions: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine that would choose another; a run of a version without ``auto`` used what is stored."""
    asked = config(completions, llama, tmp_path / "run", precision="bf16")
    with killed_after(1):
        run(asked, progress=False)
    monkeypatch.setattr("inlay.train.loading.half_of", lambda device: None)
    file = tmp_path / "run" / "run.yaml"
    saved = file.read_text(encoding="utf-8")
    assert "precision: bf16\n" in saved
    assert resumed_config(tmp_path / "run", {}).precision == "bf16"
    assert resumed_config(tmp_path / "run", {"precision": "auto"}).precision == "bf16"
    with pytest.raises(ConfigError, match="precision is 'fp32', but the run has 'bf16'"):
        resumed_config(tmp_path / "run", {"precision": "fp32"})
    for quantize, precision in (("null", "fp32"), ("nf4", "bf16")):
        early = saved.replace("precision: bf16\n", "precision: null\n")
        file.write_text(early.replace("quantize: null", f"quantize: {quantize}"), encoding="utf-8")
        assert resumed_config(tmp_path / "run", {}).precision == precision


def test_heads_and_early_stopping(bert: Path, tmp_path: Path) -> None:
    data = tiny.jsonl(tmp_path / "rows.jsonl", "classification")
    asked = config(data, bert, tmp_path / "a", eval_every=2, save_every=2, steps=30, early_stopping=2)
    whole = run(asked, progress=False)
    assert whole.stopped_early and whole.steps >= 6
    again = interrupted(asked.changed(out=str(tmp_path / "b")), 3, 5, whole.steps - 1)
    assert metrics(whole) == metrics(again)
    assert (whole.adapter / FILE).read_bytes() == (again.adapter / FILE).read_bytes()


def test_killed_between_the_last_step_and_the_end(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = config(completions, llama, tmp_path / "a")
    whole = run(asked, progress=False)
    asked = asked.changed(out=str(tmp_path / "b"))
    with mock.patch("inlay.train.running._finish", side_effect=_Killed), pytest.raises(_Killed):
        run(asked, progress=False)
    again = run(asked, resume=True, progress=False)
    assert metrics(whole) == metrics(again)
    assert (whole.adapter / FILE).read_bytes() == (again.adapter / FILE).read_bytes()


def test_checkpoints_hold_no_base(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = config(completions, llama, tmp_path / "run", save_every=1)
    with killed_after(3):
        run(asked, progress=False)
    names = {path.name for path in (tmp_path / "run" / "checkpoints" / "checkpoint-2").iterdir()}
    expected = {"adapter.safetensors", "optimizer.pt", "passes.json", "rng_state.pth", "scheduler.pt"}
    assert names == expected | {"trainer_state.json"}
    assert len(list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))) == 1


def test_nothing_else_may_have_changed(completions: Path, llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(completions.read_bytes())
    base = tiny.llama(tmp_path / "base")
    asked = config(data, base, tmp_path / "run", save_every=1)
    with killed_after(2):
        run(asked, progress=False)
    assert resumed_config(asked.out, {"out": asked.out, "data": str(data), "steps": 3}).steps == 3
    with pytest.raises(ConfigError, match="batch_size is 8, but the run has 4"):
        resumed_config(asked.out, {"out": asked.out, "batch_size": 8})
    tiny.jsonl(data, seed=9)
    with pytest.raises(DataError, match="changed since the run began"):
        run(asked, resume=True, progress=False)
    data.write_bytes(completions.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="changed since the run began"):
        run(asked, resume=True, progress=False)


def test_the_same_command_again_has_the_same_options(tmp_path: Path) -> None:
    """Lists come from the command line as tuples, from the file as lists."""
    words = {"data": "x", "out": str(tmp_path), "method": "prompt-tuning"}
    settings = {"init": "labels", "labels": ("yes", "no")}
    (tmp_path / "run.yaml").write_text(RunConfig.of({**words, "settings": settings}).to_yaml(), encoding="utf-8")
    assert resumed_config(tmp_path, {"out": str(tmp_path), "settings": {"labels": ("yes", "no")}})
    with pytest.raises(ConfigError, match="settings is"):
        resumed_config(tmp_path, {"out": str(tmp_path), "settings": {"labels": ("no", "yes")}})


def test_a_signal_finishes_the_step_and_saves(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = config(completions, llama, tmp_path / "a", settings={"dropout": 0.3}, steps=9)
    whole = run(asked, progress=False)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        other = asked.changed(out=str(tmp_path / f"b{code}"))
        with _signal_in_step(5, number), pytest.raises(Stopped, match=r"up to step 5.*--resume") as caught:
            run(other, progress=False)
        assert caught.value.exit_code == code
        again = run(other, resume=True, progress=False)
        assert metrics(whole) == metrics(again)
        assert (whole.adapter / FILE).read_bytes() == (again.adapter / FILE).read_bytes()


@contextmanager
def _signal_in_step(step: int, number: int) -> Iterator[None]:
    from inlay.train.trainer import AdapterTrainer

    whole = AdapterTrainer.compute_loss

    def signalled(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return whole(self, *args, **kwargs)

    with mock.patch.object(AdapterTrainer, "compute_loss", signalled):
        yield


COMMAND = [sys.executable, "-c", "from inlay.cli.main import main; main()", "train"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_real_signals(completions: Path, llama: Path, tmp_path: Path, number: int, code: int) -> None:
    asked = config(completions, llama, tmp_path / "a", settings={"dropout": 0.3}, save_every=3, steps=60)
    whole = run(asked, progress=False)
    (tmp_path / "run.yaml").write_text(asked.to_yaml(), encoding="utf-8")
    out = tmp_path / "b"
    process = subprocess.Popen(
        [*COMMAND, "--config", str(tmp_path / "run.yaml"), "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while _steps(out) < 7 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == code, told
    assert "Traceback" not in told
    if number != signal.SIGKILL:
        assert told.splitlines()[-1].endswith(f"Continue with: inlay train --out {out} --resume")
    assert not (out / "result.json").exists(), "the run was over before the signal came"
    subprocess.run([*COMMAND, "--out", str(out), "--resume", "--json"], check=True, capture_output=True)
    again = RunResult.read(out / "result.json")
    assert metrics(whole) == metrics(again)
    assert (whole.adapter / FILE).read_bytes() == (again.adapter / FILE).read_bytes()


def _steps(out: Path) -> int:
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0
