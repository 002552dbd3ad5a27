"""The plan that a run says before it starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.train import foresight


def prepared(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    config = {"batch_size": 4, "accumulate": 1, "gradient_checkpointing": False, **changes}
    return SimpleNamespace(
        config=SimpleNamespace(**config),
        base=SimpleNamespace(model=model),
        adapter=adapter,
        method=adapter.method,
        task="causal",
        train=_Rows([[1] * n for n in (5, 30, 7, 9, 11)]),
    )


class _Rows(list):  # type: ignore[type-arg]
    def __getitem__(self, key: Any) -> Any:
        return list(self) if key == "input_ids" else super().__getitem__(key)


def test_a_plan_for_the_longest_rows() -> None:
    run = prepared()
    plan = foresight.plan_of(run)
    assert (plan.setting.batch, plan.setting.length, plan.setting.precision) == (4, 30, "fp32")
    assert plan.trainable == run.adapter.count
    assert plan.base_parameters == sum(p.numel() for p in run.base.model.parameters()) - run.adapter.count
    assert foresight.plan_of(prepared(gradient_checkpointing=True)).memory.total < plan.memory.total


def test_a_line_and_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "free_bytes", lambda: foresight.ceiling(prepared()))
    line = foresight.foresee(prepared())
    assert line is not None and line.startswith("plan: ") and "worst moment" in line and "\n" not in line
    monkeypatch.setattr(foresight, "free_bytes", lambda: 1000)
    warned = foresight.foresee(prepared())
    assert warned is not None and "warning: " in warned and "--gradient-checkpointing" in warned


@pytest.mark.parametrize("changes", [{}, {"batch_size": 2}, {"gradient_checkpointing": True}])
def test_the_ceiling_is_above_every_plan(changes: dict[str, Any]) -> None:
    run = prepared(**changes)
    memory, most = foresight.plan_of(run).memory, foresight.ceiling(run)
    assert most is not None and most > memory.total - memory.weights


def test_nothing_is_traced_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Any) -> Any:
        raise AssertionError("a step was traced")

    run = prepared()
    most = foresight.ceiling(run)
    assert most is not None
    monkeypatch.setattr(foresight, "plan_of", fails)
    monkeypatch.setattr(foresight, "free_bytes", lambda: 2 * most)
    line = foresight.foresee(run)
    assert line is not None and line.startswith("plan: less than ")


def test_what_cannot_be_planned_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Any) -> Any:
        raise RuntimeError("an architecture that cannot be followed")

    monkeypatch.setattr(foresight, "plan_of", fails)
    monkeypatch.setattr(foresight, "free_bytes", lambda: 1000)
    assert foresight.foresee(prepared()) is None


def test_what_is_free() -> None:
    free = foresight.free_bytes()
    assert free is None or free > 0
