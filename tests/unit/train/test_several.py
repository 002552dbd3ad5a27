"""Runs that share a base are, to the bit, the runs that they are alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.core.errors import ConfigError, OutputError
from inlay.train import RunConfig, RunResult, Stopped, run
from inlay.train.several import checked, run_several, run_together
from tests import tiny
from tests.unit.train.test_resume import killed_after
from tests.unit.train.test_run import config, metrics

FILE = "adapter.safetensors"


def same(ours: RunResult, theirs: RunResult) -> None:
    """The folders hold the same, but for the clock, the memory and their own names."""
    assert metrics(ours) == metrics(theirs)
    assert (ours.adapter / FILE).read_bytes() == (theirs.adapter / FILE).read_bytes()
    first, second = (json.loads((r.adapter / "training.json").read_text()) for r in (ours, theirs))
    assert first == second
    assert {p.name for p in ours.out.rglob("*")} == {p.name for p in theirs.out.rglob("*")}
    kept = [
        {
            k: v
            for k, v in r.to_dict().items()
            if k not in ("out", "adapter", "seconds", "peak_memory_bytes", "tokens_per_second")
        }
        for r in (ours, theirs)
    ]
    assert kept[0] == kept[1]
    configs = [RunConfig.read(r.out / "run.yaml").changed(out="x") for r in (ours, theirs)]
    assert configs[0] == configs[1]


def three(data: Path, other: Path, base: Path, out: Path) -> list[RunConfig]:
    return [
        config(data, base, out / "lora", settings={"rank": 2, "dropout": 0.3}, steps=7, eval_every=3),
        config(other, base, out / "ia3", method="ia3", batch_size=3, accumulate=2, seed=5, steps=4, name="third"),
        config(data, base, out / "adalora", method="adalora", steps=9, early_stopping=3, eval_every=2),
    ]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return tiny.jsonl(tmp_path / "chats.jsonl", "chat")


def test_together_is_alone(completions: Path, other: Path, llama: Path, tmp_path: Path) -> None:
    alone = [run(one, progress=False) for one in three(completions, other, llama, tmp_path / "alone")]
    together = run_together(three(completions, other, llama, tmp_path / "together"))
    for ours, theirs in zip(together, alone, strict=True):
        same(ours, theirs)


def test_prompts_between_packed_rows(completions: Path, llama: Path, tmp_path: Path) -> None:
    def four(out: Path) -> list[RunConfig]:
        methods = [("lora", {}), ("prefix-tuning", {"length": 4}), ("prompt-tuning", {"length": 4}), ("bitfit", {})]
        return [config(completions, llama, out / m, method=m, settings=settings) for m, settings in methods]

    alone = [run(one, progress=False) for one in four(tmp_path / "alone")]
    for ours, theirs in zip(run_together(four(tmp_path / "together")), alone, strict=True):
        same(ours, theirs)


def test_the_bases_own_weights(completions: Path, llama: Path, tmp_path: Path) -> None:
    """Where another run changes the base's weights for itself, the fast paths of frozen ones step aside."""

    def both(out: Path) -> list[RunConfig]:
        return [config(completions, llama, out / "a", steps=4), config(completions, llama, out / "b", method="full")]

    alone = [run(one, progress=False) for one in both(tmp_path / "alone")]
    for ours, theirs in zip(run_together(both(tmp_path / "together")), alone, strict=True):
        for mine, its in zip(metrics(ours), metrics(theirs), strict=True):
            assert mine == pytest.approx(its, rel=1e-4)


def test_each_run_has_the_head_that_its_seed_draws(bert: Path, tmp_path: Path) -> None:
    data = tiny.jsonl(tmp_path / "rows.jsonl", "classification")

    def both(out: Path) -> list[RunConfig]:
        return [config(data, bert, out / str(seed), seed=seed, steps=5, eval_every=2) for seed in (1, 2)]

    alone = [run(one, progress=False) for one in both(tmp_path / "alone")]
    for ours, theirs in zip(run_together(both(tmp_path / "together")), alone, strict=True):
        same(ours, theirs)


def test_different_cuts_on_one_base(completions: Path, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "llama", dropout=0.0)

    def all_three(out: Path) -> list[RunConfig]:
        upper = {"layers": [1], "where": "all-linear", "steps": 10}
        return [
            config(completions, base, out / "a", **upper),
            config(completions, base, out / "b", **upper, seed=3),
            config(completions, base, out / "c", steps=10, batch_size=3),
        ]

    alone = [run(one, progress=False) for one in all_three(tmp_path / "alone")]
    for ours, theirs in zip(run_together(all_three(tmp_path / "together")), alone, strict=True):
        same(ours, theirs)


def test_resumed_together(completions: Path, other: Path, llama: Path, tmp_path: Path) -> None:
    alone = [run(one, progress=False) for one in three(completions, other, llama, tmp_path / "alone")]
    asked = three(completions, other, llama, tmp_path / "together")
    with killed_after(3):
        run_together(asked)
    with killed_after(6):  # the second run ends at its fourth step
        run_together(asked, resume=True)
    for ours, theirs in zip(run_together(asked, resume=True), alone, strict=True):
        same(ours, theirs)


def test_a_stop_stops_all(completions: Path, other: Path, llama: Path, tmp_path: Path) -> None:
    from unittest import mock

    from inlay.train.callbacks import Pace

    whole = Pace.on_step_end

    def stopping(self: Pace, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.request.number = 2
        whole(self, args, state, control, **kwargs)

    asked = three(completions, other, llama, tmp_path / "together")
    with mock.patch.object(Pace, "on_step_end", stopping), pytest.raises(Stopped, match="--resume") as stopped:
        run_together(asked)
    assert stopped.value.exit_code == 130
    alone = [run(one, progress=False) for one in three(completions, other, llama, tmp_path / "alone")]
    for ours, theirs in zip(run_together(asked, resume=True), alone, strict=True):
        same(ours, theirs)


def test_one_that_fails_leaves_the_others(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = [
        config(completions, llama, tmp_path / "a", learning_rate=1e30, max_grad_norm=0, method="full", steps=6),
        config(completions, llama, tmp_path / "b", steps=6),
    ]
    with pytest.raises(ConfigError, match=r"1 of 2 runs failed(.|\n)*diverged"):
        run_together(asked)
    assert (tmp_path / "b" / "result.json").is_file() and not (tmp_path / "a" / "result.json").exists()


def test_what_cannot_share_a_base(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = [config(completions, llama, tmp_path / "a"), config(completions, llama, tmp_path / "b", precision="bf16")]
    with pytest.raises(ConfigError, match="precision is 'bf16', but 'fp32'"):
        run_together(asked)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "other").write_text("")
    with pytest.raises(OutputError):
        run_together(asked)
    values = {"data": str(completions), "out": str(tmp_path / "c")}
    with pytest.raises(ConfigError, match="its own out"):
        checked([values, values], resume=False)
    with pytest.raises(ConfigError, match="run 2 of 2"):
        checked([values, {**values, "out": str(tmp_path / "d"), "epoch": 1}], resume=False)


def test_one_after_another(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = [config(completions, llama, tmp_path / name) for name in "ab"]
    first, second = run_several(asked, lambda _: run, together=False)
    assert metrics(first) == metrics(second)
    assert run_several(asked, lambda _: run, together=False, resume=True) == [first, second]
