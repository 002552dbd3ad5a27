"""Adapters computed at once give what the loop over them gives, whatever the mixture, the ranks and the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import inlay
from inlay import (
    IA3,
    MAM,
    BitFit,
    DoRA,
    Houlsby,
    LLaMAAdapter,
    LoRA,
    NormTuning,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
)
from inlay.core.contracts.delta import groups_itself
from inlay.core.forward.active_adapters import roster_of
from inlay.core.forward.segments import Segments
from inlay.core.prompts import prefill
from inlay.methods._bottleneck import BottleneckDelta
from inlay.methods._low_rank import EmbeddingLowRank, LowRank
from inlay.methods.dora import DoRADelta, DroppedDelta
from inlay.testing.models import ZOO

ranks = st.integers(1, 6)
METHODS = st.one_of(
    st.builds(LoRA, rank=ranks, alpha=st.floats(1, 8), rank_stabilised=st.booleans()),
    st.builds(DoRA, rank=ranks),
    st.just(IA3()),
    st.just(IA3(entering=("q_proj",))),
    st.builds(Houlsby, bottleneck=ranks),
    st.builds(Pfeiffer, reduction=st.integers(2, 9), nonlinearity=st.sampled_from(["relu", "gelu"])),
    st.builds(ParallelAdapter, bottleneck=ranks),
    st.just(BitFit()),
    st.just(NormTuning()),
    st.builds(PrefixTuning, length=ranks, projection=st.sampled_from([None, 3])),
    st.builds(PromptTuning, length=ranks, init=st.just("random")),
    st.builds(LLaMAAdapter, length=ranks),
    st.just(MAM(length=2, bottleneck=2, projection=None)),
)
# Of the outputs' standard deviation.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}


def attached(model: Any, methods: list[Any]) -> list[str]:
    """The names of the methods that the model takes, with values shaken."""
    names = []
    for number, method in enumerate(methods):
        name = f"a{number}"
        try:
            adapter = inlay.attach(model, method, name=name)
        except inlay.UserError:
            continue
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        names.append(name)
    return names


def outputs(model: Any, choice: list[str | None], batch: dict[str, Tensor], *, loop: bool) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        if loop:
            patch.setattr(prefill, "stackable", lambda: False)
        with inlay.use(model, choice), torch.no_grad():
            logits: Tensor = model(**batch).logits
    return logits.float()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_at_once_is_one_after_another(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["llama", "gpt2", "opt", "bert"]))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    model = ZOO[kind].build().to(dtype)
    names = attached(model, data.draw(st.lists(METHODS, min_size=2, max_size=7)))
    choice: list[str | None] = data.draw(st.lists(st.sampled_from([*names, None]), min_size=2, max_size=9))
    tokens = data.draw(st.integers(1, 12))
    ids = torch.randint(1, 30, (len(choice), tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : data.draw(st.integers(0, tokens - 1))] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    two = outputs(model, choice, batch, loop=True)
    outputs(model, choice, batch, loop=False)  # the second forward finds the stacks of the first
    one = outputs(model, choice, batch, loop=False)
    seen = mask.bool() if one.dim() == 3 and one.shape[1] == tokens else slice(None)
    assert (one - two)[seen].abs().max() <= TOLERANCE[dtype] * two.std()


@given(
    names=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=20),
    among=st.sets(st.sampled_from("abc"), min_size=1),
)
def test_segments_hold_each_row_once(names: list[str | None], among: set[str]) -> None:
    present = sorted(among & {n for n in names if n is not None})
    assume(present)
    segments = Segments.of(names, present, torch.device("cpu"))
    rows = torch.arange(len(names), dtype=torch.float32)[:, None, None].expand(-1, 2, 3).contiguous()
    taken = segments.take(rows)
    for owner, values in zip(segments.owners, taken, strict=True):
        assert {names[int(r)] for r in values[:, 0]} == {owner}
    expected = torch.tensor([-1.0 if n in present else r for r, n in enumerate(names)])
    assert torch.equal(segments.put(rows.clone(), torch.full_like(taken, -1.0))[:, 0, 0], expected)
    moved = segments.put(rows.clone(), taken.clone())
    assert torch.equal(moved, rows)


@pytest.fixture
def pair() -> Any:
    model = ZOO["llama"].build()
    assert attached(model, [LoRA(rank=2), LoRA(rank=3), DoRA(rank=2), PromptTuning(length=2, init="random")])
    return model


CHOICE = ["a0", "a1", None, "a2", "a1", "a3"]
IDS = {"input_ids": torch.arange(1, 25).reshape(6, 4) % 20}


def changes(model: Any, name: str) -> dict[str, Any]:
    """Every way in which an adapter's values become others."""
    parameter = next(iter(inlay.adapters(model)[name].parameters()))
    module = next(m for m in inlay.adapters(model)[name].modules() if any(p is parameter for p in m.parameters()))

    def replace() -> None:
        owner = next(m for m in module.modules() if any(p is parameter for p in m._parameters.values()))
        own = next(n for n, p in owner._parameters.items() if p is parameter)
        owner._parameters[own] = torch.nn.Parameter(parameter.detach() + 1)

    def step() -> None:
        parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD([parameter], lr=1.0).step()

    return {
        "in place": lambda: parameter.detach().add_(1),
        "optimizer": step,
        "other storage": lambda: setattr(parameter, "data", parameter.detach() + 1),
        "other parameter": replace,
        "state": lambda: module.load_state_dict({n: t + 1 for n, t in module.state_dict().items()}),
    }


@pytest.mark.parametrize("name", ["a1", "a2", "a3"])
@pytest.mark.parametrize("how", ["in place", "optimizer", "other storage", "other parameter", "state"])
def test_changed_values_are_seen(pair: Any, name: str, how: str) -> None:
    before = outputs(pair, CHOICE, IDS, loop=False)
    changes(pair, name)[how]()
    after = outputs(pair, CHOICE, IDS, loop=False)
    torch.testing.assert_close(after, outputs(pair, CHOICE, IDS, loop=True), rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("end", ["q_proj.weight", "input_layernorm.weight"])
def test_a_changed_base_is_seen(pair: Any, end: str) -> None:
    """DoRA's norms and a prefilled prompt hold something of the base."""
    outputs(pair, CHOICE, IDS, loop=False)
    value = next(p for n, p in pair.named_parameters() if n.endswith(end))
    with torch.no_grad():
        value.mul_(1.5)
    one, two = (outputs(pair, CHOICE, IDS, loop=loop) for loop in (False, True))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_another_adapter_under_the_same_name_is_another(pair: Any) -> None:
    outputs(pair, CHOICE, IDS, loop=False)
    inlay.detach(pair, "a1")
    inlay.attach(pair, LoRA(rank=3), name="a1")
    for parameter in inlay.adapters(pair)["a1"].parameters():
        torch.nn.init.normal_(parameter)
    one, two = (outputs(pair, CHOICE, IDS, loop=loop) for loop in (False, True))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_training_and_gradients_take_the_loop(pair: Any) -> None:
    kept = roster_of(pair).kept
    with inlay.use(pair, CHOICE):
        pair(**IDS).logits.sum().backward()
    assert not kept.routes
    pair.train()
    with inlay.use(pair, CHOICE), torch.no_grad():
        pair(**IDS)
    assert not any(groups for stacks in kept.routes.values() for groups, _ in stacks.at.values())


def test_few_routes_are_kept(pair: Any) -> None:
    for row in range(6):
        choice: list[str | None] = ["a0"] * 6
        choice[row] = "a1"
        outputs(pair, choice, IDS, loop=False)
    assert len(roster_of(pair).kept.routes) == 4


def test_a_class_that_computes_otherwise_is_not_grouped_as_its_parent() -> None:
    assert all(map(groups_itself, (LowRank, DoRADelta, BottleneckDelta)))
    assert not any(map(groups_itself, (EmbeddingLowRank, DroppedDelta)))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_generation(pair: Any, dtype: torch.dtype) -> None:
    pair.to(dtype)
    batch = {"input_ids": IDS["input_ids"], "max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    with inlay.use(pair, CHOICE):
        scores = pair.generate(**batch, output_logits=True, return_dict_in_generate=True).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "stackable", lambda: False)
        with inlay.use(pair, CHOICE):
            loop = pair.generate(**batch, output_logits=True, return_dict_in_generate=True).logits
    assert (scores[0].float() - loop[0].float()).abs().max() <= TOLERANCE[dtype] * loop[0].float().std()
    if dtype == torch.float32:
        torch.testing.assert_close(torch.stack(scores), torch.stack(loop), rtol=1e-4, atol=1e-5)
