"""FISH mask, LT-SFT and diff pruning against training by hand: a plain copy of the base whose gradients are masked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.errors import ConfigError, SelectionError
from inlay.methods.diff_pruning import DiffPruning
from inlay.methods.fish_mask import FishMask
from inlay.methods.lt_sft import LTSFT
from inlay.testing.models import ZOO
from tests.golden.hand import close, inputs, with_weights, zoo_model

RATE = 0.02


def batches(name: str, count: int = 2) -> list[dict[str, Tensor]]:
    return [ZOO[name].batch(3, seed) for seed in range(count)]


def in_blocks(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if any(word.isdigit() for word in n.split("."))}


def top(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Name → mask of the largest of all, by one sort over everything."""
    everything = torch.cat([s.flatten() for s in scores.values()])
    threshold = everything.sort(descending=True).values[int(share * len(everything)) - 1]
    return {n: s >= threshold for n, s in scores.items()}


def now(adapter: inlay.Adapter, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that the adapted model computes with."""
    return {p.key: p.difference.apply_to(base[p.key]) for p in adapter.pieces}  # type: ignore[union-attr]


# -- FISH mask ----------------------------------------------------------------------------------------------


def fisher(name: str, rows: int) -> dict[str, Tensor]:
    model: Any = zoo_model(name)
    total = {n: torch.zeros_like(p) for n, p in in_blocks(model).items()}
    each = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches(name) for i in range(3)]
    for row in each[:rows]:
        model.zero_grad()
        model(**row).loss.backward()
        for n, p in in_blocks(model).items():
            total[n] += p.grad**2 / rows if p.grad is not None else 0
    return total


@pytest.mark.parametrize("name, rows", [("llama", 6), ("gpt2", 6), ("bert", 4), ("t5", 6), ("mixtral", 6)])
def test_the_mask_is_where_fisher_information_is_largest(name: str, rows: int) -> None:
    model = zoo_model(name)
    model.requires_grad_(False)
    adapter = inlay.attach(model, FishMask(share=0.02, samples=rows), data=iter(batches(name)))
    masks = top(fisher(name, rows), 0.02)
    assert adapter.count == sum(int(m.sum()) for m in masks.values())
    stored = adapter.tensors()
    for parameter, mask in masks.items():
        at = stored.get(f"difference/{parameter}/indices", torch.zeros(0, dtype=torch.int32))
        assert torch.equal(at.long(), mask.flatten().nonzero()[:, 0]), parameter
        assert at.dtype == torch.int32
    assert len({n.split("/")[1] for n in stored}) == sum(bool(m.any()) for m in masks.values()) < len(masks)


def test_training_moves_the_mask_alone() -> None:
    """Two steps of SGD with momentum equal those of a plain copy with masked gradients."""
    plain: Any = ZOO["bert"].build()
    masks = top(fisher("bert", 6), 0.03)
    optimizer = torch.optim.SGD([p for n, p in plain.named_parameters() if n in masks], lr=RATE, momentum=0.9)
    model: Any = ZOO["bert"].build()
    adapter = inlay.attach(model, FishMask(share=0.03), data=batches("bert"))
    ours = torch.optim.SGD(adapter.parameters(), lr=RATE, momentum=0.9)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for seed in (5, 6):
        batch = ZOO["bert"].batch(4, seed)
        for each, steps in ((plain, optimizer), (model, ours)):
            steps.zero_grad()
            each(**batch).loss.backward()
            for n, p in in_blocks(plain).items() if each is plain else ():
                p.grad = p.grad * masks[n] if p.grad is not None else None
            steps.step()
    for n, value in now(adapter, before).items():
        close(value, plain.get_parameter(n), 1e-6)
        assert torch.equal(value[~masks[n]], before[n][~masks[n]])
    close(model(**batch).logits, plain(**batch).logits)


def test_the_search_leaves_no_trace_and_asks_for_labels() -> None:
    model: Any = ZOO["llama"].build().train()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches("llama")]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError, match="labels"):
        inlay.attach(model, FishMask(), data=unlabelled)
    with pytest.raises(ConfigError, match="no rows"):
        inlay.attach(model, FishMask(), data=[])
    with pytest.raises(ConfigError, match="data"):
        inlay.attach(model, FishMask())
    assert flags == [p.requires_grad for p in model.parameters()] and model.training and not inlay.adapters(model)
    inlay.attach(model, FishMask(), data=batches("llama"))
    assert all(p.grad is None for p in model.parameters()) and model.training
    inlay.attach(model, FishMask(), name="second", data=batches("llama"))
    assert inlay.adapters(model)["second"].digest == inlay.adapters(model)["default"].digest, "the base is looked at"


# -- LT-SFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_lt_sft_is_training_rewinding_and_training_what_moved(name: str, tmp_path: Path) -> None:
    model: Any = zoo_model(name)
    adapter = inlay.attach(model, LTSFT(share=0.05, first_phase=0.6, total_steps=5))
    plain: Any = zoo_model(name)
    start = {n: p.detach().clone() for n, p in in_blocks(plain).items() if "norm" not in n.lower()}
    assert {p.key for p in adapter.pieces} == set(start)
    chosen = {n: plain.get_parameter(n) for n in start}
    ours = torch.optim.AdamW(adapter.parameters(), lr=RATE, weight_decay=0.0)
    theirs = torch.optim.AdamW(chosen.values(), lr=RATE, weight_decay=0.0)
    masks: dict[str, Tensor] = {}
    for step in range(1, 6):
        batch = ZOO[name].batch(3, step)
        for each, optimizer in ((plain, theirs), (model, ours)):
            optimizer.zero_grad()
            each(**batch).loss.backward()
            for n, p in chosen.items() if each is plain and masks else ():
                p.grad *= masks[n]
            optimizer.step()
        if step == 3:
            masks = top({n: (p.detach() - start[n]).abs() for n, p in chosen.items()}, 0.05)
            for n, p in chosen.items():
                p.data.copy_(start[n])
            theirs = torch.optim.AdamW(chosen.values(), lr=RATE, weight_decay=0.0)
        if step == 2:
            inlay.save(model, "default", tmp_path / "early")
        stored = adapter.tensors()
        for n, p in chosen.items():
            assert torch.equal(stored[f"difference/{n}/mask"], masks.get(n, torch.ones_like(p, dtype=torch.bool)))
            close(stored[f"difference/{n}/difference"], p - start[n], 1e-4)
            assert not masks or (stored[f"difference/{n}/difference"][~masks[n]] == 0).all()
    kept = sum(int(m.sum()) for m in masks.values())
    assert kept == int(0.05 * sum(p.numel() for p in start.values()))
    finished(model, name, tmp_path, kept)
    early = inlay.load(zoo_model(name), tmp_path / "early", trainable=True)
    assert early.clock is not None and int(early.tensors()["shared/schedule/done"]) == 2


def finished(model: Any, name: str, folder: Path, kept: int) -> None:
    """A finished adapter is written as its entries, and computes the same."""
    inlay.save(model, "default", folder / "sparse")
    again: Any = zoo_model(name)
    loaded = inlay.load(again, folder / "sparse", trainable=True)
    assert loaded.count == kept and loaded.clock is None
    assert {n.rpartition("/")[2] for n in loaded.tensors()} == {"indices", "values"}
    batch = inputs(name)
    expected = model.eval()(**batch).logits
    assert torch.equal(again(**batch).logits, expected)
    inlay.save(again, "default", folder / "twice")
    assert inlay.load(zoo_model(name), folder / "twice").digest == loaded.digest


# -- diff pruning -------------------------------------------------------------------------------------------


def toy() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def gate(alpha: Tensor) -> Tensor:
    u = torch.rand(alpha.shape).clamp(0.0001, 0.9999)
    s = torch.sigmoid(torch.log(u) - torch.log(1 - u) + alpha)
    return torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), s * 3.0 - 1.5))


class Paper:
    """Diff pruning of the toy by hand; the penalty is part of the loss. Gates are drawn in the order of the layers."""

    def __init__(self, structured: bool) -> None:
        self.start = {n: p.detach().clone() for n, p in toy().named_parameters()}
        self.w = {n: torch.zeros_like(p, requires_grad=True) for n, p in self.start.items()}
        self.alpha = {n: torch.full_like(p, 0.5, requires_grad=True) for n, p in self.start.items()}
        self.group = {n: torch.full((1,), 0.5, requires_grad=True) for n in self.start} if structured else {}
        self.mask: dict[str, Tensor] = {}
        self.renew()

    def renew(self) -> None:
        gates = [*self.alpha.values(), *self.group.values()]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(self.w.values()), "lr": 0.01}, {"params": gates, "lr": 0.05}], weight_decay=0.0
        )

    def delta(self) -> dict[str, Tensor]:
        if self.mask:
            return {n: w * self.mask[n] for n, w in self.w.items()}
        found = {}
        for n, w in self.w.items():
            found[n] = gate(self.alpha[n]) * w
            if self.group:
                found[n] = found[n] * gate(self.group[n])
        return found

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        d = {n: self.start[n] + delta for n, delta in self.delta().items()}
        hidden = torch.tanh(x @ d["0.weight"].T + d["0.bias"])
        return (hidden @ d["2.weight"].T + d["2.bias"] - y).square().mean()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        penalty = sum(
            torch.sigmoid(a - math.log(1.5 / 1.5)).sum() for a in (*self.alpha.values(), *self.group.values())
        )
        (loss if self.mask else loss + 0.01 * penalty).backward()
        self.optimizer.step()
        return loss.detach()

    def project(self, share: float) -> None:
        drawn = {n: d.detach() for n, d in self.delta().items()}
        self.mask = top({n: d.abs() for n, d in drawn.items()}, share)
        for n, w in self.w.items():
            w.data.copy_(drawn[n] * self.mask[n])
        self.renew()


@pytest.mark.parametrize("structured", [False, True])
def test_diff_pruning_is_the_papers(structured: bool) -> None:
    method = DiffPruning(
        share=0.2, structured=structured, penalty=0.01, gate_start=0.5, gate_rate=5.0, first_phase=0.6, total_steps=10
    )
    model = toy()
    adapter = inlay.attach(model, method)
    paper = Paper(structured)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(0.01), weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    model.train()
    for t in range(1, 11):
        x, y = torch.randn(7, 6, generator=generator), torch.randn(7, 3, generator=generator)
        torch.manual_seed(t)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        torch.manual_seed(t)
        close(loss, paper.step(x, y), 1e-6)
        if t == 6:
            paper.project(0.2)
        stored = adapter.tensors()
        for n in paper.start:
            close(stored[f"difference/{n}/difference"], paper.w[n])
            if t < 6:
                close(stored[f"difference/{n}/gates"], paper.alpha[n])
                assert not structured or bool((stored[f"difference/{n}/group"] - paper.group[n]).abs().max() < 1e-5)
            else:
                assert torch.equal(stored[f"difference/{n}/gates"] > 0, paper.mask[n])
                assert (stored[f"difference/{n}/difference"][~paper.mask[n]] == 0).all()
    assert sum(int(m.sum()) for m in paper.mask.values()) == int(0.2 * 53)
    base = {n: p.detach() for n, p in toy().named_parameters()}
    for mode in (True, False):  # gates that are fixed are fixed in training, too
        model.train(mode)
        for n, value in now(adapter, base).items():
            close(value, base[n] + paper.w[n] * paper.mask[n], 1e-6)
            assert torch.equal(value[~paper.mask[n]], base[n][~paper.mask[n]])


def test_gates_have_their_most_likely_value_outside_training() -> None:
    model: Any = ZOO["llama"].build()
    adapter = inlay.attach(model, DiffPruning(gate_start=1.0, total_steps=4))
    with torch.no_grad():
        for piece in adapter.pieces:
            piece.difference.difference.normal_(0, 0.1)  # type: ignore[union-attr]
    stored = {n: t.clone() for n, t in adapter.tensors().items()}
    z = min(1.0, 1 / (1 + math.exp(-1.0)) * 3 - 1.5)

    def change(n: str, value: Tensor) -> Tensor:
        return value + z * z * stored[f"difference/{n}/difference"] if f"difference/{n}/gates" in stored else value

    batch = inputs("llama")
    close(model(**batch).logits, with_weights(ZOO["llama"].build(), change, batch).logits)
    assert not torch.allclose(model.train()(**batch).logits, model(**batch).logits), "training draws"


def test_a_finished_diff_is_written_as_its_entries(tmp_path: Path) -> None:
    model: Any = ZOO["llama"].build()
    adapter = inlay.attach(model, DiffPruning(share=0.01, total_steps=2))
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    assert sorted(g["lr"] for g in optimizer.param_groups) == [1e-3, 10.0]
    for seed in range(2):
        model(**ZOO["llama"].batch(3, seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    finished(model, "llama", tmp_path, int(0.01 * sum(p.numel() for p in in_blocks(ZOO["llama"].build()).values())))


@pytest.mark.parametrize("method", ["lt-sft", "diff-pruning", "adalora"])
def test_a_run_gives_what_the_schedule_ends_in(method: str, tmp_path: Path) -> None:
    """The best adapter of a run is not one from the first phase, however well that does."""
    from inlay.formats.header import read_header
    from inlay.train import RunConfig, run
    from tests import tiny

    config = RunConfig.of({
        "data": str(tiny.jsonl(tmp_path / "rows.jsonl")), "base": str(tiny.llama(tmp_path / "base")),
        "out": str(tmp_path / "run"), "method": method, "steps": 6, "batch_size": 4, "eval_share": 0.2,
        "eval_every": 1, "learning_rate": 0.03,
    })  # fmt: skip
    result = run(config, progress=False)
    lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 6 and result.metrics["eval_loss"] == min(losses[2:])
    assert method != "lt-sft" or losses[1] < min(losses[2:]), "the trap that this test is about is not there"
    settings = read_header(result.adapter)["method"]
    assert settings["rank_pattern" if method == "adalora" else "chosen"], "the file holds what is left of a schedule"


# -- places -------------------------------------------------------------------------------------------------


def test_places() -> None:
    model = ZOO["gpt2"].build()
    every = LTSFT(total_steps=4)
    keys = {
        "layer": {p.key for p in inlay.attach(model, every, name="a", layers=[1]).pieces},
        "module": {p.key for p in inlay.attach(model, every, name="b", where=["c_attn", "c_fc"], layers=[0]).pieces},
        "name": {p.key for p in inlay.attach(model, every, name="c", where=["transformer.wte.weight"]).pieces},
    }
    assert all(".h.1." in k for k in keys["layer"]) and not any("ln_" in k for k in keys["layer"])
    assert keys["module"] == {
        f"transformer.h.0.{m}.{n}" for m in ("attn.c_attn", "mlp.c_fc") for n in ("weight", "bias")
    }
    assert keys["name"] == {"transformer.wte.weight"}
    with pytest.raises(SelectionError, match="part of a fused matrix"):
        inlay.attach(model, every, name="d", where=["query"])
    with pytest.raises(SelectionError, match="no parameters"):
        inlay.attach(nn.Linear(2, 2), every)


def test_places_given_as_a_predicate_are_stored(tmp_path: Path) -> None:
    model = ZOO["llama"].build()
    adapter = inlay.attach(model, LTSFT(total_steps=4), where=lambda path, _: path.endswith("layers.0.mlp.up_proj"))
    inlay.save(model, "default", tmp_path)
    assert inlay.load(ZOO["llama"].build(), tmp_path).digest == adapter.digest


@pytest.mark.parametrize("method", [LTSFT(), DiffPruning()])
def test_the_length_of_the_run_must_be_known(method: Any) -> None:
    model = toy()
    adapter = inlay.attach(model, method)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(torch.randn(2, 6)).sum().backward()
    with pytest.raises(ConfigError, match="total_steps"):
        optimizer.step()
    adapter.method = method.for_steps(2)
    optimizer.step()
