"""`inlay train --method fusion`: adapters of other runs, by their folders, in one new adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import inlay
from inlay import Pfeiffer
from inlay.train import RunConfig, load_base, run
from tests import tiny

Command = Callable[..., tuple[int, str, str]]
SEQ_BN = {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "original_ln_after": True,
          "residual_before_ln": True, "non_linearity": "relu", "reduction_factor": 8}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def members(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of two tasks, one of them with more labels than the other."""
    root, found = tmp_path_factory.mktemp("members"), []
    for name, labels in (("colours", "abc"), ("sizes", "xy")):
        rows = [{"text": row["text"], "label": labels[i % len(labels)]} for i, row in enumerate(tiny.rows("text", 12))]
        data = root / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = RunConfig(data=str(data), out=str(root / name), base=str(bert), method="pfeiffer",
                           settings={"reduction": 4}, steps=3, batch_size=4, eval_share=0)  # fmt: skip
        found.append(run(config, progress=False).adapter)
    return found


@pytest.fixture
def words(bert: Path, members: list[Path], tmp_path: Path) -> list[Any]:
    data = tiny.jsonl(tmp_path / "rows.jsonl", "classification", 16)
    return ["train", "--data", data, "--base", bert, "--method", "fusion", "--set",
            f"adapters={members[0]},{members[1]}", "--steps", 4, "--batch-size", 4, "--eval-share", 0]  # fmt: skip


def tensors(bert: Path, folder: Path, labels: str) -> tuple[Any, inlay.Adapter]:
    base = load_base(bert, task="classification", label_names=list(labels))
    return base.model, inlay.load(base.model, folder, name="loaded")


def test_two_runs_in_a_third(
    bert: Path, members: list[Path], words: list[Any], command: Command, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    code, out, error = command(*words, "--out", tmp_path / "fused", "--json")
    assert code == 0, error
    # One artefact: it loads on the bare base, with copies of its members as they were and a head of its own.
    model, fused = tensors(bert, tmp_path / "fused" / "adapter", "yn")
    assert fused.method.methods == (Pfeiffer(reduction=4), Pfeiffer(reduction=4))  # type: ignore[attr-defined]
    assert fused.method.adapters == ("colours", "sizes")  # type: ignore[attr-defined]
    assert fused.modules_to_save and list(inlay.adapters(model)) == ["loaded"]
    assert json.loads(out)["trainable"] == fused.count + fused.count_copied
    own = fused.tensors()
    for number, (folder, labels) in enumerate(zip(members, ("abc", "xy"), strict=True)):
        _, member = tensors(bert, folder, labels)
        for name, value in member.tensors().items():
            if name.startswith("delta/"):
                place, _, part = name.rpartition("/")
                assert torch.equal(own[f"{place}/members.{number}.{part}"], value)
    # What a run writes down starts the same run, from anywhere.
    monkeypatch.chdir(tmp_path.parent)
    code, _, error = command("train", "--config", tmp_path / "fused" / "run.yaml", "--out", tmp_path / "again")
    assert code == 0, error
    assert tensors(bert, tmp_path / "again" / "adapter", "yn")[1].digest == fused.digest
    data = words[words.index("--data") + 1]
    code, out, error = command("evaluate", "--data", data, "--adapter", tmp_path / "fused" / "adapter", "--json")
    assert code == 0 and 0 <= json.loads(out)["metrics"]["accuracy"] <= 100, error


def test_members_in_adapterhubs_files(bert: Path, words: list[Any], command: Command, tmp_path: Path) -> None:
    model = load_base(bert, task="classification", label_names=["n", "y"]).model
    hidden, layers, config = model.config.hidden_size, model.config.num_hidden_layers, SEQ_BN
    torch.manual_seed(0)
    for name in ("first", "second"):
        stored = {}
        for at in (f"bert.encoder.layer.{i}.output.adapters.{name}" for i in range(layers)):
            stored[f"{at}.adapter_down.0.weight"] = torch.randn(4, hidden)
            stored[f"{at}.adapter_down.0.bias"] = torch.ones(4)
            stored[f"{at}.adapter_up.weight"] = torch.randn(hidden, 4)
            stored[f"{at}.adapter_up.bias"] = torch.ones(hidden)
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"config": config, "name": name}))
        save_file(stored, tmp_path / name / "adapter.safetensors")
    words = [f"adapters={tmp_path / 'first'},{tmp_path / 'second'}" if "adapters=" in str(w) else w for w in words]
    code, _, error = command(*words, "--out", tmp_path / "fused")
    assert code == 0, error
    _, fused = tensors(bert, tmp_path / "fused" / "adapter", "ny")
    last = [value for name, value in fused.tensors().items() if "members.1" in name and name.endswith("up")][-1]
    assert torch.equal(last, stored[f"bert.encoder.layer.{layers - 1}.output.adapters.second.adapter_up.weight"])


def test_it_goes_on_where_it_stopped(bert: Path, members: list[Path], tmp_path: Path) -> None:
    """A checkpoint holds the members, too; they are read from their folders again and then from it."""
    data = str(tiny.jsonl(tmp_path / "rows.jsonl", "classification", 16))
    asked: dict[str, Any] = {"data": data, "base": str(bert), "method": "fusion", "steps": 4, "batch_size": 4,
                             "eval_share": 0, "save_every": 2}  # fmt: skip
    asked["settings"] = {"adapters": [str(m) for m in members]}
    whole = run(RunConfig(**asked, out=str(tmp_path / "whole")), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        from inlay.train import trainer

        steps: list[int] = []
        saved = trainer.AdapterTrainer._save_checkpoint

        def dying(self: Any, model: Any, trial: Any) -> None:
            saved(self, model, trial)
            steps.append(self.state.global_step)
            raise KeyboardInterrupt

        patch.setattr(trainer.AdapterTrainer, "_save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            run(RunConfig(**asked, out=str(tmp_path / "cut")), progress=False)
    assert steps == [2]
    cut = run(RunConfig(**asked, out=str(tmp_path / "cut")), resume=True, progress=False)
    assert tensors(bert, cut.adapter, "yn")[1].digest == tensors(bert, whole.adapter, "yn")[1].digest


def test_mistakes(bert: Path, members: list[Path], words: list[Any], command: Command, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    run(
        RunConfig(data=str(words[2]), out=str(elsewhere), base=str(bert), method="pfeiffer", layers=[0], steps=1,
                  settings={"reduction": 4}, eval_share=0),
        progress=False,
    )  # fmt: skip
    at = words.index("--set") + 1
    for given, said in (
        ("adapters=runs/none,runs/neither", "'runs/neither': no such folder or file"),
        (f"adapters={members[0]}", "expected at least two"),
        (f"adapters={members[0]},{elsewhere / 'adapter'}", "different places"),
        (f"adapters={members[0]},{tmp_path}", "no adapter.safetensors"),
        ("regularisation=0.1", "--set adapters=PATH,PATH"),
    ):
        code, out, error = command(*words[:at], given, *words[at + 1 :], "--out", tmp_path / "out")
        assert (code, out) == (2, "") and said in error and "Traceback" not in error, error
        assert not (tmp_path / "out").exists()
