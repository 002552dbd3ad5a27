"""Any sequence of operations leaves no trace: a state machine against a table of what must be true.

The table holds what each adapter gives alone on a fresh model; nothing that happens to other adapters may
change it, and once the last adapter is gone the model is what it was.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import inlay
from inlay import (
    IA3,
    DoRA,
    FullFineTuning,
    Houlsby,
    LoRA,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    TopLayers,
)  # fmt: skip
from inlay.testing.models import ZOO

METHODS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (LoRA(rank=2), {}),
    (LoRA(rank=2), {"where": "all-linear"}),
    (DoRA(rank=2), {}),
    (IA3(), {}),
    (Houlsby(bottleneck=2), {}),
    (ParallelAdapter(bottleneck=2), {}),
    (PromptTuning(length=2, init="random"), {}),
    (PrefixTuning(length=3, projection=None), {}),
    (TopLayers(top=1), {}),
    (FullFineTuning(), {}),
    (LoRA(rank=1), {"modules_to_save": ["lm_head"]}),
)
NAMES = ("a", "b", "c", "d")
WHOLE = ("top-layers", "full")
MERGES = ("lora", "dora", "ia3", "top-layers", "full")
SPECIMEN = ZOO["llama"]


def account(model: Any) -> dict[str, Any]:
    """Everything of a model that an adapter could leave a trace in."""
    return {
        "keys": list(model.state_dict()),
        "classes": {n: (type(m), sorted(k for k in m.__dict__ if "inlay" in k)) for n, m in model.named_modules()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "parameters": {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()},
        "forwards": {n: "forward" in m.__dict__ for n, m in model.named_modules()},
        "attention": model.config._attn_implementation,
        "tied": model.config.tie_word_embeddings,
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for entry in before:
        if entry != "parameters":
            assert before[entry] == after[entry], entry
    assert list(before["parameters"]) == list(after["parameters"])
    for name, (identity, value) in before["parameters"].items():
        assert after["parameters"][name][0] == identity, f"{name} is another object"
        assert torch.equal(after["parameters"][name][1], value), name


def near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> bool:
    return float((actual - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


class Operations(RuleBasedStateMachine):
    """The model under test, and what each of its adapters gives alone."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.model: Any = SPECIMEN.build()
        for parameter in self.model.model.norm.parameters():
            parameter.requires_grad_(False)  # flags that are not all alike
        self.before = account(self.model)
        self.batch = SPECIMEN.batch(3, 1, ragged=True)
        del self.batch["labels"]
        self.base = self.model(**self.batch).logits.detach()
        self.alone: dict[str, Tensor] = {}
        self.methods: dict[str, str] = {}
        self.saved: dict[str, tuple[Tensor, str]] = {}
        self.active: str | None = None
        self.merged: str | None = None

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        if self.merged is not None:
            inlay.unmerge(self.model)
        for name in list(self.alone):
            inlay.detach(self.model, name)
        assert_same(self.before, account(self.model))
        assert torch.equal(self.model(**self.batch).logits, self.base)
        shutil.rmtree(self.folder)

    def logits(self) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.model(**self.batch).logits
        real = self.batch["attention_mask"].bool()
        return out.masked_fill(~real[..., None], 0.0)

    def expected(self, name: str | None) -> Tensor:
        real = self.batch["attention_mask"].bool()
        out = self.base if name is None else self.alone[name]
        return out.masked_fill(~real[..., None], 0.0)

    # -- operations -----------------------------------------------------------------------------

    @precondition(lambda self: self.merged is None and len(self.alone) < 4)
    @rule(name=st.sampled_from(NAMES), choice=st.sampled_from(range(len(METHODS))), seed=st.integers(0, 99))
    def attach(self, name: str, choice: int, seed: int) -> None:
        method, where = METHODS[choice]
        if name in self.alone:
            with pytest.raises(inlay.UserError, match="already"):
                inlay.attach(self.model, method, name=name, **where)
            return
        torch.manual_seed(seed)
        adapter = inlay.attach(self.model, method, name=name, **where)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        single: Any = SPECIMEN.build()
        twin = inlay.attach(single, method, **where)
        with torch.no_grad():
            for theirs, ours in zip(twin.parameters(), adapter.parameters(), strict=True):
                theirs.copy_(ours)
            self.alone[name] = single(**self.batch).logits
        self.methods[name], self.active = method.name, name

    @rule(where=st.sampled_from(["nothing", ["q_proj", "x"], "query.", ["norm"]]))
    def fail_to_attach(self, where: Any) -> None:
        keys = list(self.model.state_dict())
        with pytest.raises(inlay.UserError):
            inlay.attach(self.model, LoRA(rank=2), name="new", where=where)
        with pytest.raises(inlay.UserError):
            inlay.attach(self.model, inlay.BitFit(), name="new")
        with pytest.raises(inlay.UserError):
            inlay.attach(self.model, LoRA(rank=2), name="no good")
        assert list(self.model.state_dict()) == keys and "new" not in inlay.adapters(self.model)
        if not self.alone:
            assert_same(self.before, account(self.model))

    @precondition(lambda self: self.alone)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alone)))
        if self.merged is not None:
            with pytest.raises(inlay.UserError, match="merged"):
                inlay.detach(self.model, name)
            return
        inlay.detach(self.model, name)
        del self.alone[name], self.methods[name]
        if self.active == name:
            self.active = next(reversed(self.alone), None)
        if not self.alone:
            assert_same(self.before, account(self.model))

    @precondition(lambda self: self.alone and self.merged is None)
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alone)))
        if self.methods[name] not in MERGES:
            held = account(self.model)
            with pytest.raises(inlay.UserError):
                inlay.merge(self.model, name)
            assert_same(held, account(self.model))
            return
        inlay.merge(self.model, name)
        self.merged = name
        assert near(self.logits(), self.expected(name), 1e-4)

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self) -> None:
        inlay.unmerge(self.model)
        self.merged = None

    @precondition(lambda self: self.alone and self.merged is None)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alone)))
        held = account(self.model)
        inlay.save(self.model, name, self.folder / name)
        assert_same(held, account(self.model))
        self.saved[name] = (self.alone[name], self.methods[name])

    @precondition(lambda self: self.saved and self.merged is None and len(self.alone) < 4)
    @rule(data=st.data(), trainable=st.booleans())
    def load(self, data: st.DataObject, trainable: bool) -> None:
        stored = data.draw(st.sampled_from(sorted(self.saved)))
        free = [n for n in NAMES if n not in self.alone]
        name = data.draw(st.sampled_from(free))
        adapter = inlay.load(self.model, self.folder / stored, name=name, trainable=trainable)
        assert adapter.trainable == trainable
        self.alone[name], self.methods[name] = self.saved[stored]
        self.active = name
        assert near(self.logits(), self.expected(name))

    @precondition(lambda self: self.alone and self.merged is None)
    @rule(data=st.data())
    def use_rows(self, data: st.DataObject) -> None:
        names = st.none() | st.sampled_from(sorted(self.alone))
        rows = data.draw(st.lists(names, min_size=3, max_size=3))
        if len(set(rows)) > 1 and any(self.methods.get(n or "") in WHOLE for n in rows):
            with pytest.raises(inlay.UserError), inlay.use(self.model, rows):
                pass
            return
        with inlay.use(self.model, rows):
            mixed = self.logits()
        for row, name in enumerate(rows):
            assert near(mixed[row], self.expected(name)[row]), (rows, row)

    @precondition(lambda self: self.alone and self.merged is None)
    @rule(data=st.data())
    def leave_by_an_exception(self, data: st.DataObject) -> None:
        name = data.draw(st.none() | st.sampled_from(sorted(self.alone)))
        with pytest.raises(ZeroDivisionError), inlay.use(self.model, name):
            raise ZeroDivisionError

    @precondition(lambda self: self.alone and self.merged is None)
    @rule()
    def copy_the_model(self) -> None:
        twin = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in inlay.adapters(twin)[str(self.active)].parameters():
                parameter.zero_()
        for name in list(self.alone):
            inlay.detach(twin, name)
        assert torch.equal(twin(**self.batch).logits, self.base)

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_active_adapter_answers(self) -> None:
        if not hasattr(self, "model"):
            return
        assert list(inlay.adapters(self.model)) == list(self.alone)
        if self.merged is None:
            assert near(self.logits(), self.expected(self.active))

    @invariant()
    def the_base_is_within_reach_and_frozen(self) -> None:
        if not hasattr(self, "model") or not self.alone or self.merged is not None:
            return
        with inlay.use(self.model, None):
            assert torch.equal(self.logits(), self.expected(None))
        now = dict(self.model.named_parameters())
        for name, (identity, value) in self.before["parameters"].items():
            assert id(now[name]) == identity and torch.equal(now[name], value)
            assert not now[name].requires_grad


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=12, stateful_step_count=14, deadline=None)
