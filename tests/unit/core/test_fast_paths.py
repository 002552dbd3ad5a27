"""One switch: while it is off, the model's own code and the adapters' plain formulas are in force everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import inlay
from inlay import LoRA, PrefixTuning
from inlay.core.errors import ConfigError
from inlay.core.forward import wrappers
from inlay.core.forward.active_adapters import roster_of
from inlay.kernels.lazy import LazyTensor
from inlay.testing.models import ZOO

IDS = torch.arange(8).reshape(2, 4)
ROUTE = ["a", "b"]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = set(wrappers.OFF)
    yield
    assert before == wrappers.OFF, "a test left the switch somewhere else"


def attached() -> Any:
    model: Any = ZOO["llama"].build()
    inlay.attach(model, PrefixTuning(length=3), name="prefix")
    inlay.attach(model, LoRA(rank=2), name="b")
    inlay.attach(model, LoRA(rank=2, dropout=0.5), name="a")
    return model


def everything(model: Any) -> None:
    """What any fast path could have a part in: training, mixed rows, prompts, a second forward with kept ones."""
    model.train()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    model.eval()
    with torch.no_grad():
        for choice in ("prefix", "prefix", ROUTE, ["prefix", "a"]):
            with inlay.use(model, choice):
                model(input_ids=IDS)


def refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("a fast path ran while it was off")


def test_off_means_off_everywhere() -> None:
    model = attached()
    fast = dict.fromkeys(wrappers._WRAPPERS.keys() & wrappers.FAST_PATHS.keys(), refused)
    wrapped = [h for h in model.modules() if h.__dict__.get("_inlay_host") and h.__dict__["_inlay_host"].wrappers]
    for module in wrapped:
        host = module.__dict__["_inlay_host"]
        host.wrappers = tuple((n, fast.get(n, w)) for n, w in host.wrappers)
    patches = [
        mock.patch.dict(wrappers._AROUND_ROOT, dict.fromkeys(wrappers.AROUND_ROOT, refused)),
        mock.patch("inlay.core.prompts.prefix_attention.fused", refused),
        mock.patch("inlay.core.prompts.stacked_prefixes.stacked", lambda *_: None),
        mock.patch("inlay.core.forward.batched_adapters.Stacks.groups", refused),
        mock.patch("inlay.core.forward.cache.Kept.keep", refused),
        mock.patch("inlay.methods._low_rank.LowRank.with_layer", refused),
        mock.patch("inlay.methods._low_rank.LowRank.post_into", refused),
    ]
    for patch in patches:
        patch.start()
    try:
        with inlay.fast_paths(False):
            everything(model)
        with pytest.raises(AssertionError, match="while it was off"):
            everything(model)  # so the patches do sit where the fast paths are
    finally:
        mock.patch.stopall()


def test_the_models_own_loss_and_scores_come_back() -> None:
    base: Any = ZOO["llama"].build()
    expected = base(input_ids=IDS, labels=IDS)
    model = attached()
    with inlay.fast_paths(False), inlay.use(model, None):
        out = model(input_ids=IDS, labels=IDS)
    assert type(out.logits) is Tensor and torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)
    with inlay.fast_paths(False, "loss-at-labels"), inlay.use(model, "b"):
        assert type(model(input_ids=IDS, labels=IDS).logits) is Tensor
    with inlay.use(model, "b"):
        model(input_ids=IDS, labels=IDS)
        assert type(model(input_ids=IDS, labels=IDS).logits) is LazyTensor


def test_on_and_off_agree() -> None:
    model = attached()
    with torch.no_grad():
        for parameter in inlay.adapters(model)["a"].parameters():
            parameter.add_(0.1)
    model.eval()
    made = {}
    for on in (True, False):
        with inlay.fast_paths(on), torch.no_grad():
            for choice in ("prefix", ["a", "prefix"], ["b", "a"]):
                with inlay.use(model, choice):
                    made[on, str(choice)] = model(input_ids=IDS).logits
    for (on, choice), found in made.items():
        torch.testing.assert_close(found, made[not on, choice], rtol=1e-4, atol=1e-5)


def test_what_is_on_and_where() -> None:
    model = attached()
    found = inlay.fast_paths(model=model)
    assert list(found) == list(wrappers.FAST_PATHS) and all(path.on for path in found.values())
    layers = model.config.num_hidden_layers
    assert found["norm"].places == 2 * layers + 1 and found["attention-backward"].places == layers
    assert found["gated-mlp"].places == layers and found["prefix-attention"].places == layers
    assert found["loss-at-labels"].places == found["kept-prompts"].places == found["packing"].places == 1
    assert found["trunk-cache"].places == 0 and found["fused-update"].places == found["grouped-rows"].places > 0
    assert inlay.fast_paths()["norm"].places >= found["norm"].places
    assert repr(found).count("\n") == len(found) - 1 and "on" in repr(found)
    for name in list(inlay.adapters(model)):
        inlay.detach(model, name)
    assert all(path.places == 0 for path in inlay.fast_paths(model=model).values())


def test_a_block_takes_its_switch_back() -> None:
    with inlay.fast_paths(False, "norm"):
        with inlay.fast_paths(False):
            assert not any(path.on for path in inlay.fast_paths().values())
        off = [name for name, path in inlay.fast_paths().items() if not path.on]
        assert off == ["norm"]
        with pytest.raises(RuntimeError), inlay.fast_paths(True):
            assert inlay.fast_paths()["norm"].on
            raise RuntimeError
        assert not inlay.fast_paths()["norm"].on
    inlay.fast_paths(False, "dropout")
    assert not inlay.fast_paths()["dropout"].on
    inlay.fast_paths(True)


def test_unknown_names_change_nothing() -> None:
    with pytest.raises(ConfigError, match="unknown fast path 'nrom'; did you mean 'norm'"):
        inlay.fast_paths(False, "nrom", "dropout")
    assert inlay.fast_paths()["dropout"].on


@pytest.mark.parametrize(
    ("value", "off"),
    [
        ("", set()),
        ("1", set()),
        ("0", set(wrappers.FAST_PATHS)),
        ("-norm, -dropout", {"norm", "dropout"}),
        ("norm,dropout", set(wrappers.FAST_PATHS) - {"norm", "dropout"}),
    ],
)
def test_the_environment_switches(value: str, off: set[str]) -> None:
    assert wrappers._from_environment(value) == off


@pytest.mark.parametrize("value", ["norms", "-norm,dropout", "0,norm", "off"])
def test_the_environment_is_checked(value: str) -> None:
    with pytest.raises(ConfigError, match="INLAY_FAST_PATHS is"):
        wrappers._from_environment(value)


def test_wrappers_stand_in_the_order_of_the_list() -> None:
    features = frozenset({"norm", "rotary", "root", "dropout", "stack"})
    assert [name for name, _ in wrappers.among(features)] == ["rotary", "stack", "root", "dropout", "norm"]
    with pytest.raises(ValueError, match="'later' has no place yet"):
        wrappers.register("later", refused)


def test_a_switched_path_is_traced_again() -> None:
    torch._dynamo.reset()
    model = attached()
    roster_of(model).active = "a"
    model.eval()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for on in (True, False, True):
            with inlay.fast_paths(on):
                made = compiled(input_ids=IDS, use_cache=False).logits
                torch.testing.assert_close(made, model(input_ids=IDS, use_cache=False).logits)
    torch._dynamo.reset()
