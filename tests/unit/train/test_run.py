"""Whole runs on tiny bases: every task and kind of method, what they leave behind, and that they say nothing odd."""

from __future__ import annotations

import json
import math
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.core.errors import ConfigError, DataError, OutputError, UnsupportedError
from inlay.train import RunConfig, RunResult, load_base, read_record, run
from inlay.train.prepare import prepare
from inlay.train.stop import Stopped
from inlay.train.trainer import AdapterTrainer
from tests import tiny


def config(data: Path, base: Path, out: Path, **changes: Any) -> RunConfig:
    small = {"steps": 3, "batch_size": 4, "eval_share": 0.2}
    return RunConfig.of({"data": str(data), "base": str(base), "out": str(out), **small, **changes})


def metrics(result: RunResult) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_what_a_run_leaves(completions: Path, llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(config(completions, llama, tmp_path / "run"), progress=False)
    assert capfd.readouterr() == ("", "")
    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    adapter = {"adapter", *(f"adapter/{name}" for name in ("README.md", "adapter.safetensors", "training.json"))}
    assert left == {"run.yaml", "metrics.jsonl", "result.json", *adapter}
    assert RunResult.read(tmp_path / "run" / "result.json") == result
    assert result.steps == 3 and result.tokens_per_second > 0 and result.peak_memory_bytes > 2**20
    assert set(result.metrics) == {"train_loss", "eval_loss"}
    card = (result.adapter / "README.md").read_text()
    for part in ("LoRA", llama.name, completions.name, "learning_rate", f"{result.trainable:,}", "inlay.load(model"):
        assert part in card
    record = read_record(result.adapter)
    assert record is not None and (record.task, record.kind) == ("causal", "completion")
    assert record.base == str(llama), "the run's own configuration has the whole path"
    for file in ("metrics.jsonl", "result.json", *adapter - {"adapter"}):
        told = (tmp_path / "run" / file).read_bytes()
        for path in (llama, completions, tmp_path):
            assert bytes(path.parent) not in told, f"{file} tells where {path.name} lies on this machine"


def test_the_saved_configuration_reproduces_the_run(completions: Path, llama: Path, tmp_path: Path) -> None:
    first = run(config(completions, llama, tmp_path / "a", settings={"dropout": 0.2}), progress=False)
    again = run(RunConfig.read(tmp_path / "a" / "run.yaml", out=str(tmp_path / "b")), progress=False)
    assert metrics(first) == metrics(again)
    name = "adapter.safetensors"
    assert (first.adapter / name).read_bytes() == (again.adapter / name).read_bytes()
    saved = RunConfig.read(tmp_path / "a" / "run.yaml")
    assert None not in (saved.task, saved.learning_rate, saved.schedule, saved.warmup, saved.max_length, saved.on_long)


@pytest.mark.parametrize(
    ("base", "kind", "task", "method"),
    [
        ("llama", "completion", "causal", "prompt-tuning"),
        ("llama", "chat", "causal", "prefix-tuning"),
        ("llama", "text", "causal", "bitfit"),
        ("llama", "classification", "classification", "ia3"),
        ("bert", "classification", "classification", "top-layers"),
        ("bert", "regression", "regression", "pfeiffer"),
        ("t5", "completion", "seq2seq", "full"),
    ],
)
def test_tasks_are_guessed_and_learn(
    request: pytest.FixtureRequest, tmp_path: Path, base: str, kind: str, task: str, method: str
) -> None:
    folder: Path = request.getfixturevalue(base)
    settings = {"length": 4} if "tuning" in method else {}
    data = tiny.jsonl(tmp_path / "rows.jsonl", kind)
    asked = config(data, folder, tmp_path / "run", method=method, settings=settings, steps=12, learning_rate=1e-2)
    result = run(asked, progress=False)
    record = read_record(result.adapter)
    assert record is not None and record.task == task
    losses = [line["loss"] for line in metrics(result) if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    loaded = load_base(folder, task=task, label_names=record.labels)
    adapter = inlay.load(loaded.model, result.adapter)
    assert set(loaded.fresh) <= set(adapter.modules_to_save)
    assert sum(p.numel() for p in adapter.parameters()) == result.trainable


def test_the_loss_does_not_depend_on_how_a_step_is_cut(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Passes with unlike numbers of scored items; models that heed num_items_in_batch and such that do not."""
    for base, kind in (
        ("llama", "completion"),
        ("t5", "completion"),
        ("bert", "classification"),
        ("bert", "regression"),
    ):
        data = tiny.jsonl(tmp_path / f"{base}-{kind}.jsonl", kind, 30)
        found = []
        for size, passes in ((8, 1), (2, 4)):
            out = tmp_path / f"{base}-{kind}-{size}"
            asked = config(
                data, request.getfixturevalue(base), out, batch_size=size, accumulate=passes, max_grad_norm=0
            )
            asked = asked.changed(settings={"dropout": 0.0}, epochs=1, steps=None, eval_share=0)
            found.append(_without_dropout(asked))
        # One epoch of 30 rows: the last step has fewer rows, and in the second run fewer passes too.
        assert found[0] == pytest.approx(found[1], rel=2e-4), (base, kind)


def _without_dropout(asked: RunConfig) -> list[float]:
    """The losses of an epoch in the file's order, at a learning rate that changes nothing."""
    from unittest import mock

    still = mock.patch("torch.nn.functional.dropout", lambda x, *a, **k: x)
    plain = mock.patch("inlay.kernels.dropout.applies", lambda *_: False)
    attend = torch.nn.functional.scaled_dot_product_attention
    even = mock.patch(
        "torch.nn.functional.scaled_dot_product_attention", lambda *a, **k: attend(*a, **{**k, "dropout_p": 0.0})
    )
    order = mock.patch("inlay.train.order.LengthGroupedOrder.__iter__", lambda self: iter(range(len(self))))
    with still, plain, even, order:
        result = run(asked.changed(learning_rate=1e-12), progress=False)
    return [line["loss"] for line in metrics(result) if "loss" in line]


def test_evaluation_weighs_every_token_alike(completions: Path, llama: Path, tmp_path: Path) -> None:
    """The reported loss is the one over all held-out tokens at once."""
    held = tiny.jsonl(tmp_path / "held.jsonl", count=11, seed=5)
    result = run(config(completions, llama, tmp_path / "run", eval_data=str(held)), progress=False)
    from inlay.data import collate, encode, read_table, resolve_columns

    base = load_base(llama)
    inlay.load(base.model, result.adapter)
    table = read_table(held)
    rows = encode(table, resolve_columns(table), base.tokenizer, task="causal", max_length=tiny.CONTEXT)
    with torch.no_grad():
        loss = base.model.eval()(**collate(base.tokenizer, "causal")(list(rows))).loss
    assert result.metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_evaluating_changes_nothing_in_training(completions: Path, llama: Path, tmp_path: Path) -> None:
    held = tiny.jsonl(tmp_path / "held.jsonl", count=6, seed=5)
    asked = config(completions, llama, tmp_path / "a", eval_share=0, settings={"dropout": 0.3})
    without = run(asked, progress=False)
    often = run(asked.changed(out=str(tmp_path / "b"), eval_data=str(held), eval_every=1), progress=False)
    assert metrics(without) == [line for line in metrics(often) if "loss" in line]


def test_early_stopping_keeps_the_best(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = config(completions, llama, tmp_path / "run", learning_rate=3.0, schedule="constant", eval_every=2, steps=40)
    result = run(asked.changed(early_stopping=2, warmup=0.0, max_grad_norm=0), progress=False)
    scores = {line["step"]: line["eval_loss"] for line in metrics(result) if "eval_loss" in line}
    assert result.stopped_early and result.best_step == min(scores, key=lambda step: scores[step])
    assert result.steps == result.best_step + 4
    assert result.metrics["eval_loss"] == scores[result.best_step]


def test_a_last_step_that_diverges_leaves_no_adapter(
    completions: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later step has a loss that shows it; the evaluation's is no number, which must not pass for the best."""
    step = AdapterTrainer.training_step

    def spoilt(trainer: AdapterTrainer, *args: Any, **options: Any) -> Any:
        loss = step(trainer, *args, **options)
        next(p for p in trainer.adapter.parameters() if p.grad is not None).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(AdapterTrainer, "training_step", spoilt)
    with pytest.raises(ConfigError, match="step 1 left infinite or NaN values in the adapter"):
        run(config(completions, llama, tmp_path / "run", steps=1), progress=False)
    assert not (tmp_path / "run" / "adapter").exists()


def test_padding_stands_on_the_right_whatever_the_tokenizer_says(completions: Path, tmp_path: Path) -> None:
    """Models that count positions by themselves begin at a row's first place, and evaluation pads so."""
    base = tiny.llama(tmp_path / "base")
    said = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**said, "padding_side": "left"}))
    prepared = prepare(config(completions, base, tmp_path / "run", packing=False))
    assert prepared.base.tokenizer.padding_side == "left"
    shortest, *_, longest = sorted(prepared.train, key=lambda row: len(row["input_ids"]))
    mask = prepared.collator([shortest, longest])["attention_mask"]
    assert bool(mask[:, 0].all()) and not bool(mask.all())


def test_labels_that_a_decoder_answers_with_are_recorded(llama: Path, tmp_path: Path) -> None:
    """Evaluating chooses among them, whichever of them its own rows have."""
    data = tmp_path / "labelled.jsonl"
    rows = [{"text": f"the cat {n}", "label": ("red", "blue", "green")[n % 3]} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(config(data, llama, tmp_path / "run", task="causal", steps=1, eval_share=0), progress=False)
    record = read_record(result.adapter)
    assert record is not None and record.labels == ("blue", "green", "red")
    assert "num_labels" not in (result.adapter / "README.md").read_text(encoding="utf-8")


def test_gradient_checkpointing_changes_nothing(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = config(completions, llama, tmp_path / "a")
    plain = run(asked, progress=False)
    spared = run(asked.changed(out=str(tmp_path / "b"), gradient_checkpointing=True), progress=False)
    for one, other in zip(metrics(plain), metrics(spared), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_plain_run_gives_the_same_without_fast_paths(completions: Path, llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    facts = json.loads((base / "config.json").read_text()) | {
        "attention_dropout": 0.0
    }  # whose masks are drawn otherwise
    (base / "config.json").write_text(json.dumps(facts))
    asked = config(completions, base, tmp_path / "fast", packing=False)  # which makes other batches
    fast = run(asked, progress=False)
    plain = run(asked.changed(out=str(tmp_path / "plain"), packing=None, plain=True), progress=False)
    for one, other in zip(metrics(fast), metrics(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    saved = RunConfig.read(plain.out / "run.yaml")
    assert saved.plain and saved.packing is False and all(path.on for path in inlay.fast_paths().values())
    with pytest.raises(ConfigError, match="plain switches packing off, which you asked for"):
        asked.changed(plain=True, packing=True)
    with (
        inlay.fast_paths(False, "packing"),
        pytest.raises(UnsupportedError, match="packing is asked for, but switched"),
    ):
        run(asked.changed(out=str(tmp_path / "asked"), packing=True), progress=False)
    assert not (tmp_path / "asked").exists()


def test_precision(completions: Path, llama: Path, tmp_path: Path) -> None:
    result = run(config(completions, llama, tmp_path / "run", precision="bf16"), progress=False)
    base = load_base(llama, dtype=torch.bfloat16)
    adapter = inlay.load(base.model, result.adapter)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_reporting(completions: Path, llama: Path, tmp_path: Path) -> None:
    run(config(completions, llama, tmp_path / "run", report_to=["tensorboard"]), progress=False)
    assert list((tmp_path / "run" / "runs").rglob("events.*"))


def test_what_cannot_be_run(completions: Path, llama: Path, bert: Path, tmp_path: Path) -> None:
    ok = config(completions, llama, tmp_path / "run")
    chats = tiny.jsonl(tmp_path / "chats.jsonl", "chat")
    mute = tiny.llama(tmp_path / "mute", chat=False)
    few = tiny.jsonl(tmp_path / "few.jsonl", count=5)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "has no chat template", {"data": str(chats), "base": str(mute)}),
        (DataError, "too few to hold some out", {"data": str(few), "early_stopping": 1}),
        (ConfigError, "reads 96 tokens", {"max_length": 97}),
        (ConfigError, "96 virtual tokens leave no room", {"method": "prompt-tuning", "settings": {"length": 96}}),
        (ConfigError, "lacks weights that the task causal needs", {"base": str(bert)}),
        (ConfigError, "not a regular expression", {"where": "re:("}),
        (DataError, "must have the columns of", {"eval_data": str(chats)}),
        (DataError, "more than 12", {"max_length": 12}),
        (ConfigError, "training diverged", {"method": "full", "learning_rate": 1e30, "schedule": "constant"}),
    ]
    for kind, words, changes in cases:
        with pytest.raises(kind, match=words):
            run(ok.changed(**changes), progress=False, overwrite=(tmp_path / "run").exists())
        if "diverged" not in words:
            assert not (tmp_path / "run").exists(), words


def test_a_folder_in_use(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = config(completions, llama, tmp_path / "run")
    first = run(asked, progress=False)
    with pytest.raises(OutputError, match=r"--resume.*--overwrite"):
        run(asked, progress=False)
    assert run(asked, resume=True, progress=False) == first
    assert metrics(run(asked, overwrite=True, progress=False)) == metrics(first)


def test_a_run_that_is_stopped_keeps_the_finished_one(
    completions: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(trainer: AdapterTrainer, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    out = tmp_path / "run"
    asked = config(completions, llama, out)
    run(asked, progress=False)
    kept = (out / "adapter" / "adapter.safetensors").read_bytes()
    diverging = asked.changed(method="full", learning_rate=1e30, schedule="constant")
    for again in (diverging, diverging):  # both save a checkpoint before
        with pytest.raises(ConfigError, match="training diverged"):
            run(again, overwrite=True, progress=False)
        assert (out / ".replaced" / "adapter" / "adapter.safetensors").read_bytes() == kept
    with (
        monkeypatch.context() as patch,
        pytest.raises(Stopped, match="still has the run that would have been replaced"),
    ):
        patch.setattr(AdapterTrainer, "train", stopped)
        run(asked.changed(seed=1), overwrite=True, progress=False)
    assert (out / "adapter" / "adapter.safetensors").read_bytes() == kept
    run(asked.changed(seed=1), overwrite=True, progress=False)
    assert (out / "adapter" / "adapter.safetensors").read_bytes() != kept
    assert not (out / ".replaced").exists()
