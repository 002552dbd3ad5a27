"""Runs in fp16: losses are scaled, gradients unscaled before they are clipped, and overflows left out everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.core.errors import ConfigError
from inlay.train import RunResult, run, scaling
from tests.unit.train.test_resume import interrupted
from tests.unit.train.test_run import config, metrics

FILE = "adapter.safetensors"


def strict(line: str) -> dict[str, Any]:
    """A line of JSON that has no numbers of other languages in it."""
    found: dict[str, Any] = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return found


def steps(result: RunResult) -> list[dict[str, Any]]:
    lines = [strict(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("clipped", [0.01, 0.0])
def test_the_same_training_as_in_fp32(completions: Path, llama: Path, tmp_path: Path, clipped: float) -> None:
    """With SGD an update is as long as its gradient, so a scale that is left in it, or clipped with it, would show."""
    asked = config(completions, llama, tmp_path / "fp32", optimizer="sgd", learning_rate=0.5, max_grad_norm=clipped)
    asked = asked.changed(batch_size=2, accumulate=2)  # the passes of a step are unscaled once
    single = run(asked.changed(precision="fp32"), progress=False)
    half = run(asked.changed(precision="fp16", out=str(tmp_path / "fp16")), progress=False)
    assert (half.precision, half.skipped_steps) == ("fp16", 0) and single.precision == "fp32"
    for one, other in zip(steps(half), steps(single), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)
    found, wanted = load_file(half.adapter / FILE), load_file(single.adapter / FILE)
    assert {t.dtype for t in found.values()} == {torch.float32}
    moved = {n: t for n, t in wanted.items() if n.endswith("/b") and bool(t.any())}  # B starts at zero
    assert moved
    for name, value in moved.items():
        assert (found[name] - value).norm() <= 5e-2 * value.norm(), name


def test_steps_that_overflow_are_left_out(
    completions: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves in them: neither the adapter nor the rates nor what a method counts."""
    asked = config(completions, llama, tmp_path / "run", precision="fp16", method="dylora", steps=6, eval_share=0)
    asked = asked.changed(warmup=0.0, schedule="linear", learning_rate=1e-3)
    monkeypatch.setattr(scaling, "FIRST", 2.0**60)
    monkeypatch.setattr(scaling, "FACTOR", 2.0**-24)
    result = run(asked, progress=False)
    skipped = result.skipped_steps
    assert 0 < skipped < 6
    lines = steps(result)
    assert [line.get("skipped_steps", 0) for line in lines] == [min(n, skipped) for n in range(1, 7)]
    assert ["grad_norm" in line for line in lines] == [n >= skipped for n in range(6)]
    rates = [line["learning_rate"] for line in lines]
    assert rates[: skipped + 1] == [rates[0]] * (skipped + 1) and rates[skipped + 1] < rates[0]
    stored = load_file(result.adapter / FILE)
    assert int(stored["shared/drawn/steps"]) == 6 - skipped
    assert strict((result.out / "result.json").read_text())["skipped_steps"] == skipped


def test_a_base_that_leaves_the_range_is_an_error(
    completions: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "FIRST", 2.0**60)
    monkeypatch.setattr(scaling, "LEAST", 2.0**60)
    with pytest.raises(ConfigError, match=r"overflow float16 at step 1.*--precision fp32"):
        run(config(completions, llama, tmp_path / "run", precision="fp16"), progress=False)


def test_a_resumed_run_goes_on_with_its_scale(
    completions: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "FIRST", 2.0**60)
    monkeypatch.setattr(scaling, "FACTOR", 2.0**-24)
    asked = config(completions, llama, tmp_path / "a", precision="fp16", steps=6, save_every=1)
    whole = run(asked, progress=False)
    again = interrupted(asked.changed(out=str(tmp_path / "b")), 1, 4)
    assert whole.skipped_steps == again.skipped_steps > 0
    assert metrics(whole) == metrics(again)
    assert (whole.adapter / FILE).read_bytes() == (again.adapter / FILE).read_bytes()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_in_a_plain_loop_clocks_see_true_gradients_and_no_skipped_step(fused: bool, unscaled: bool) -> None:
    """A fused optimizer is called for a step that overflows, and unscales by itself: a clock must not be fooled."""
    from inlay.core.contracts.adapter import Clock

    told: list[tuple[str, float]] = []

    class Writing(Clock):
        def before_step(self, optimizer: Any) -> None:
            told.append(("before", norm(self.adapter)))

        def after_step(self, optimizer: Any) -> None:
            told.append(("after", norm(self.adapter)))

    def norm(adapter: inlay.Adapter) -> float:
        return float(torch.stack([p.grad.norm() for p in adapter.parameters() if p.grad is not None]).norm())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    adapter = inlay.attach(model, inlay.LoRA(rank=2), where=["0", "2"])
    adapter.clock = Writing(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(4, 8)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean() * factor
        scaler.scale(loss).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    before = [p.detach().clone() for p in adapter.parameters()]
    step(float("inf"))
    assert told == [] and all(torch.equal(p, b) for p, b in zip(adapter.parameters(), before, strict=True))
    step(1.0)
    assert [word for word, _ in told] == ["before", "after"]
    moved = [p.detach().clone() for p in adapter.parameters()]
    with torch.no_grad():
        for parameter, value in zip(adapter.parameters(), before, strict=True):
            parameter.copy_(value)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    assert told[0][1] == pytest.approx(norm(adapter), rel=1e-4)
    torch.optim.AdamW(adapter.parameters(), lr=1e-2, fused=fused).step()
    for parameter, value in zip(adapter.parameters(), moved, strict=True):
        torch.testing.assert_close(parameter, value, rtol=1e-4, atol=1e-6)
