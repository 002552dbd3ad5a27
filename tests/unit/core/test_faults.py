"""Faults found by the oracles."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

import inlay
from inlay import BitFit, DoRA, LoRA, ParallelAdapter, PromptTuning
from inlay.testing.models import ZOO
from tests.golden.hand import close, inputs, shake


def mixed_is_alone(model: Any, batch: dict[str, Tensor], names: list[str]) -> None:
    with torch.no_grad():
        with inlay.use(model, names):
            mixed = model(**batch).logits
        for row, name in enumerate(names):
            with inlay.use(model, name):
                alone = model(**{k: v[row : row + 1] for k, v in batch.items()}).logits
            close(mixed[row], alone[0])


@pytest.mark.parametrize("other", [LoRA(rank=2), DoRA(rank=2)])
def test_an_adapter_beside_the_feed_forward_shares_a_batch_with_one_on_its_matrices(other: Any) -> None:
    model = ZOO["llama"].build()
    shake(inlay.attach(model, other, name="down", where=["down_proj"]))
    shake(inlay.attach(model, ParallelAdapter(bottleneck=3), name="beside"))
    mixed_is_alone(model, inputs("llama", rows=2), ["down", "beside"])
    mixed_is_alone(model, inputs("llama", rows=2), ["beside", "down"])


@pytest.mark.parametrize("name, place", [("gemma3", "embed_tokens"), ("opt", "embed_positions")])
def test_an_embedding_that_scales_or_moves_its_input_merges_exactly_or_is_refused(name: str, place: str) -> None:
    model: Any = ZOO[name].build()
    try:
        shake(inlay.attach(model, LoRA(rank=2), where=[place]))
    except inlay.UserError:
        return
    before = model(**inputs(name)).logits
    inlay.merge(model, "default")
    close(model(**inputs(name)).logits, before)


def test_positions_that_are_not_the_first_argument_are_refused_on_attach_or_work() -> None:
    model: Any = ZOO["bart"].build()
    try:
        shake(inlay.attach(model, LoRA(rank=2), where=["embed_positions"]))
    except inlay.UserError:
        return
    model(**inputs("bart"))


def test_a_table_that_is_shared_by_all_rows_cannot_be_routed_by_row() -> None:
    """T5's relative positions have no rows: (tokens, tokens) must not be read as rows × tokens."""
    model = ZOO["t5"].build()
    for name in "ab":
        adapter = inlay.attach(model, LoRA(rank=2), name=name, where=["relative_attention_bias"])
        shake(adapter, 0.3 if name == "a" else 0.8)
    with pytest.raises(inlay.UserError, match="is not a batch of rows"):
        mixed_is_alone(model, inputs("t5", rows=2), ["a", "b"])


class Experts(nn.Module):
    """Top-1 routing to linear experts, each of which sees some tokens of some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = (flat[:, 0] > 0).long()
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(flat[chosen == i])
        return out.view_as(x)


def test_tokens_that_a_router_gathers_are_never_given_to_the_wrong_row() -> None:
    model = Experts()
    for name in "ab":
        shake(inlay.attach(model, LoRA(rank=2), name=name, where=["0", "1"]), 0.3 if name == "a" else 0.8)
    x = torch.ones(2, 4, 4)
    x[0, :, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0])
    x[1, :, 0] = torch.tensor([1.0, -1.0, -1.0, -1.0])  # 4 tokens each: a multiple of the rows
    with torch.no_grad():
        try:
            with inlay.use(model, ["a", "b"]):
                mixed = model(x)
        except inlay.UserError:
            return
        for row, name in enumerate("ab"):
            with inlay.use(model, name):
                close(mixed[row], model(x[row : row + 1])[0])


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 8), lambda: nn.BatchNorm2d(8)])
def test_bitfit_on_norms_of_channels(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm()).eval()
    x = torch.randn(2, 3, 8, 8)  # as wide as it has channels
    shake(inlay.attach(model, BitFit()))
    before = model(x)
    inlay.merge(model, "default")
    close(model(x), before)


def test_saving_while_merged_knows_the_base(tmp_path: Path) -> None:
    model = ZOO["llama"].build()
    shake(inlay.attach(model, LoRA(rank=2), name="a"))
    inlay.merge(model, "a")
    try:
        inlay.save(model, "a", tmp_path)
    except inlay.UserError:
        return
    inlay.load(ZOO["llama"].build(), tmp_path)


def test_a_merge_inside_a_block_never_answers_for_another_adapter() -> None:
    model: Any = ZOO["llama"].build()
    shake(inlay.attach(model, LoRA(rank=2), name="a"))
    shake(inlay.attach(model, LoRA(rank=2), name="b"), 0.7)
    with torch.no_grad(), inlay.use(model, "b"):
        before = model(**inputs("llama")).logits
        try:
            inlay.merge(model, "a")
            after = model(**inputs("llama")).logits
        except inlay.UserError:
            return
    close(after, before)


def test_dora_follows_a_base_whose_weights_are_loaded_later() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    shake(inlay.attach(model, DoRA(rank=2), where=["0"]))
    x = torch.randn(3, 8)
    model(x)
    model.load_state_dict({k: v * 3 if k == "0.weight" else v for k, v in model.state_dict().items()})
    before = model(x)
    inlay.merge(model, "default")
    close(model(x), before)


def test_merging_into_double_precision_keeps_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8)).double()
    model[0].weight.data.add_(torch.randn(8, 8, dtype=torch.float64) * 1e-9)
    shake(inlay.attach(model, LoRA(rank=2), where=["0"]))
    x = torch.randn(3, 8, dtype=torch.float64)
    before = model(x)
    inlay.merge(model, "default")
    close(model(x), before, 1e-13)


def test_layers_that_pytorch_bypasses_are_refused_or_adapted() -> None:
    """nn.TransformerEncoderLayer in eval mode, and the projection inside nn.MultiheadAttention."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 1)
    x = torch.randn(2, 5, 16)
    model.eval()
    with torch.no_grad():
        base = model(x)
    for where in (["linear1"], ["out_proj"]):
        try:
            shake(inlay.attach(model, LoRA(rank=2), where=where))
        except inlay.UserError:
            continue
        for training in (False, True):
            model.train(training)
            with torch.no_grad():
                assert not torch.allclose(model(x), base, atol=1e-4), (where, training)
        inlay.detach(model, "default")


def test_a_prompt_that_leaves_no_learnt_position_says_so() -> None:
    model: Any = ZOO["gpt2"].build()  # 64 positions
    with pytest.raises(inlay.UserError):
        inlay.attach(model, PromptTuning(length=60))
        model(input_ids=torch.ones((1, 12), dtype=torch.long))


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.again(self.first(x).relu()))
        return out


@pytest.mark.parametrize("where", [["first", "again"], ["again"]])
def test_a_layer_at_two_places_has_one_piece_that_acts_at_both(where: list[str]) -> None:
    model, x = Twice(), torch.randn(3, 6)
    classes, before = [type(m) for m in model.modules()], model(x)
    adapter = inlay.attach(model, LoRA(rank=2), where=where)
    inlay.attach(model, LoRA(rank=2), name="other", where=["first"])
    inlay.attach(model, LoRA(rank=2), name="whole", where=["last"], modules_to_save=["again"])
    assert list(adapter.tensors()) == ["delta/first/a", "delta/first/b"]
    for name in ("default", "other", "whole"):
        with inlay.use(model, name):
            shake(inlay.adapters(model)[name])
            expected = model(x)
            assert not torch.equal(expected, before)
            inlay.merge(model, name)
            close(model(x), expected)
            inlay.unmerge(model)
    for name in ("default", "other", "whole"):
        inlay.detach(model, name)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), before)


def test_a_copy_made_while_merged_takes_back_its_own_merge() -> None:
    specimen = ZOO["llama"]
    model, batch = specimen.build(), specimen.batch(2, 0)
    expected = model(**batch).logits + 0
    shake(inlay.attach(model, LoRA(rank=2), modules_to_save=["lm_head"]))
    inlay.merge(model, "default")
    merged, copied = model(**batch).logits + 0, copy.deepcopy(model)
    inlay.unmerge(copied)
    assert torch.equal(model(**batch).logits + 0, merged)
    with inlay.use(copied, None):
        assert torch.equal(copied(**batch).logits + 0, expected)


@pytest.mark.parametrize("how", ["assign", "to_empty", "functional_call"])
def test_copies_of_modules_are_what_the_model_holds_now(how: str) -> None:
    """Whoever replaces parameters instead of writing them is heeded."""
    specimen = ZOO["llama"]
    model, batch = specimen.build(), specimen.batch(2, 0)
    adapter = inlay.attach(model, LoRA(rank=2), modules_to_save=["lm_head"])
    state = {n: torch.randn_like(t) if "inlay" in n else t.clone() for n, t in model.state_dict().items()}
    written = copy.deepcopy(model)
    written.load_state_dict(state)
    if how == "functional_call":
        out = torch.func.functional_call(model, state, (), {**batch, "labels": None})
        close(out.logits, written(**batch).logits + 0)
        return
    if how == "to_empty":
        model.to(torch.device("meta")).to_empty(device="cpu")
    model.load_state_dict(state, assign=how == "assign")
    held = {id(p) for p in model.parameters()}
    assert all(id(p) in held for p in adapter.parameters())
    if how == "assign":
        close(model(**batch).logits + 0, written(**batch).logits + 0)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Transposing(nn.Linear):
    """As Falcon's: a forward of its own that computes nothing else."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


def patched(factor: float) -> nn.Linear:
    layer = nn.Linear(4, 4)
    before = layer.forward
    layer.forward = lambda input: factor * before(input)  # type: ignore[method-assign]
    return layer


class DoubledConvolution(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer",
    [lambda: Doubled(4, 4), lambda: patched(2.0), lambda: patched(1.001), lambda: DoubledConvolution(4, 4, 1)],
)
def test_a_layer_that_gives_something_else_than_its_weight_says_is_not_merged(layer: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer())
    shake(inlay.attach(model, LoRA(rank=2), where=lambda *_: True))
    x, before = torch.randn(4, 4), [p.clone() for p in model.parameters()]
    expected = model(x)
    with pytest.raises(inlay.UserError, match="these layers have a forward of their own"):
        inlay.merge(model, "default")
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("layer", [lambda: Transposing(4, 4), lambda: patched(1.0)])
def test_a_layer_with_a_forward_of_its_own_that_is_its_weights_merges(layer: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer())
    shake(inlay.attach(model, LoRA(rank=2), where=lambda *_: True))
    x = torch.randn(3, 4)
    expected = model(x)
    inlay.merge(model, "default")
    close(model(x), expected)
    inlay.unmerge(model)
    close(model(x), expected)


def test_a_layer_that_accelerate_has_hooked_merges() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    add_hook_to_module(model[0], AlignDevicesHook("cpu"))
    shake(inlay.attach(model, LoRA(rank=2), where=lambda *_: True))
    x = torch.randn(3, 4)
    expected = model(x)
    inlay.merge(model, "default")
    close(model(x), expected)
