"""AdapterFusion against equations 2–4 of its paper, written out on the bare base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay import AdapterFusion, Houlsby, LoRA, ParallelAdapter, Pfeiffer, PrefixTuning
from inlay.core.errors import AdapterNameError, ConfigError, SelectionError, UnsupportedError
from inlay.testing.models import ZOO
from tests.golden.hand import close, cotangent, inputs, shake

BOTH = "model.layers.{}.mlp.down_proj"
ALONE = "model.layers.{}.self_attn.o_proj"


def prepared(**fields: Any) -> tuple[Any, inlay.Adapter, dict[str, Tensor]]:
    """A model with two trained adapters and a fusion of them; the adapters' values as they were."""
    model = ZOO["llama"].build()
    first = shake(inlay.attach(model, Pfeiffer(reduction=4), name="first"))
    second = shake(inlay.attach(model, Houlsby(bottleneck=3), name="second"))
    values = {f"{i}/{n}": t.clone() for i, a in enumerate((first, second)) for n, t in a.tensors().items()}
    return model, inlay.attach(model, AdapterFusion(adapters=("first", "second"), **fields), name="both"), values


def added(values: dict[str, Tensor], number: int, site: str, y: Tensor) -> Tensor:
    own = {n: values[f"{number}/delta/{site}/{n}"] for n in ("down", "down_bias", "up", "up_bias")}
    inner = (F.relu, F.gelu)[number](y @ own["down"].t() + own["down_bias"])
    return inner @ own["up"].t() + own["up_bias"]


def by_hand(bare: nn.Module, leaves: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Pfeiffer is at the feed-forward only, Houlsby there and at attention: a softmax over one there."""
    for layer in range(2):
        for template, members in ((BOTH, (0, 1)), (ALONE, (1,))):
            site = template.format(layer)

            def hook(_: Any, __: Any, y: Tensor, site: str = site, members: tuple[int, ...] = members) -> Tensor:
                own = {n: leaves[f"delta/{site}/{n}"] for n in ("query", "query_bias", "key", "key_bias", "value")}
                scores, parts = [], []
                for number in members:
                    c = added(values, number, site, y)
                    query = y @ own["query"].t() + own["query_bias"]
                    scores.append((query * (c @ own["key"].t() + own["key_bias"])).sum(-1))
                    parts.append(c @ own["value"].t())
                shares = torch.stack(scores, -1).softmax(-1)
                return y + sum(shares[..., i, None] * part for i, part in enumerate(parts))

            bare.get_submodule(site).register_forward_hook(hook)


def test_output_and_gradients() -> None:
    model, adapter, values = prepared()
    shake(adapter)
    batch = inputs("llama")
    leaves = {n: t.detach().clone().requires_grad_() for n, t in adapter.tensors().items() if "/members." not in n}
    bare: Any = ZOO["llama"].build()
    by_hand(bare, leaves, values)
    actual, expected = model(**batch).logits, bare(**batch).logits
    close(actual, expected, 2e-5)
    weights = cotangent(actual)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    found = {p.data_ptr(): p.grad for p in adapter.parameters()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        gradient = found[adapter.tensors()[name].data_ptr()]
        assert gradient is not None
        close(gradient, leaf.grad, 2e-4)


def test_what_it_starts_as() -> None:
    _, adapter, values = prepared()
    tensors = adapter.tensors()
    for layer in range(2):
        site = BOTH.format(layer)
        value = tensors[f"delta/{site}/value"]
        assert (value.diagonal() == 1).all() and (value[~torch.eye(32, dtype=torch.bool)] == 1e-6).all()
        for name in ("query", "key"):
            assert 0.018 < float(tensors[f"delta/{site}/{name}"].std()) < 0.022
            assert not tensors[f"delta/{site}/{name}_bias"].any()
        for number in (0, 1):  # the members' values are copies
            for name in ("down", "down_bias", "up", "up_bias"):
                copied = tensors[f"delta/{site}/members.{number}.{name}"]
                assert torch.equal(copied, values[f"{number}/delta/{site}/{name}"])
    assert isinstance(adapter.method, AdapterFusion)
    assert adapter.method.methods == (Pfeiffer(reduction=4), Houlsby(bottleneck=3))
    assert adapter.count == 4 * (3 * 32 * 32 + 2 * 32), "the frozen members do not count"


def test_members_are_copies_and_stay_as_they_are() -> None:
    model, adapter, _ = prepared()
    batch = inputs("llama")
    shake(adapter)
    expected = model(**batch).logits.detach()
    with torch.no_grad():
        for parameter in inlay.adapters(model)["first"].parameters():
            parameter.add_(1.0)
    assert torch.equal(model(**batch).logits, expected)
    before = {n: t.clone() for n, t in adapter.tensors().items()}
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    model(**batch).logits.square().mean().backward()
    optimizer.step()
    for name, tensor in adapter.tensors().items():
        assert torch.equal(tensor, before[name]) == ("/members." in name), name
    inlay.detach(model, "first")
    inlay.detach(model, "second")
    assert model(**batch).logits.isfinite().all()


def test_it_is_one_artefact(tmp_path: Path) -> None:
    model, adapter, _ = prepared()
    shake(adapter)
    batch = inputs("llama")
    expected = model(**batch).logits
    inlay.save(model, "both", tmp_path)
    fresh = ZOO["llama"].build()
    loaded = inlay.load(fresh, tmp_path)
    assert (loaded.digest, loaded.method) == (adapter.digest, adapter.method)
    assert torch.equal(fresh(**batch).logits, expected)


@pytest.mark.parametrize("strength", [0.0, 0.01, 0.5])
def test_the_value_matrix_is_pulled_to_the_identity(strength: float) -> None:
    """One step of gradient descent on loss + λ Σ ‖V − I‖², with autograd's gradient of it."""
    model, adapter, _ = prepared(regularisation=strength)
    shake(adapter)
    other = copy.deepcopy(model)
    batch = inputs("llama")
    twin = inlay.adapters(other)["both"]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(**batch).logits.square().mean().backward()
    optimizer.step()
    penalty = sum((m.value - torch.eye(32)).square().sum() for m in twin.modules())  # type: ignore[operator]
    loss = other(**batch).logits.square().mean() + strength * penalty
    parameters = list(twin.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data.add_(gradient, alpha=-0.1)
    for name, tensor in adapter.tensors().items():
        close(tensor, twin.tensors()[name], 1e-5)


def test_places_are_the_adapters() -> None:
    model = ZOO["llama"].build()
    for name in ("first", "second"):
        shake(inlay.attach(model, LoRA(rank=2), name=name, where=["k_proj"], layers=[1]))
    adapter = inlay.attach(model, AdapterFusion(adapters=("first", "second")), name="both")
    assert [p.key for p in adapter.pieces] == ["model.layers.1.self_attn.k_proj"]
    assert adapter.places == inlay.adapters(model)["first"].places


def test_published_size() -> None:
    """BERT-base: three matrices of 768 × 768 and two biases a layer, 21.3 million."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    for name in ("first", "second"):
        inlay.attach(model, Pfeiffer(), name=name)
    adapter = inlay.attach(model, AdapterFusion(adapters=("first", "second")), name="both")
    assert adapter.count == 12 * (3 * 768**2 + 2 * 768) == 21_252_096


def test_refusals_say_what_to_do() -> None:
    model = ZOO["llama"].build()
    two = AdapterFusion(adapters=("first", "second"))
    with pytest.raises(AdapterNameError, match=r"first.*second"):
        inlay.attach(model, two)
    with pytest.raises(SelectionError, match="at least two"):
        inlay.attach(model, AdapterFusion())
    with pytest.raises(ConfigError, match="at least two"):
        AdapterFusion(adapters=("first",))
    inlay.attach(model, Pfeiffer(reduction=4), name="first")
    inlay.attach(model, Pfeiffer(reduction=4), name="second", layers=[0])
    with pytest.raises(SelectionError, match="different places"):
        inlay.attach(model, two)
    inlay.detach(model, "second")
    inlay.attach(model, PrefixTuning(length=2), name="second")
    with pytest.raises(UnsupportedError, match="bottleneck"):
        inlay.attach(model, two)
    inlay.detach(model, "second")
    inlay.attach(model, ParallelAdapter(bottleneck=2), name="second")
    with pytest.raises(UnsupportedError, match="different inputs"):
        inlay.attach(model, two)
    inlay.detach(model, "second")
    inlay.attach(model, Pfeiffer(reduction=4), name="second")
    with pytest.raises(SelectionError, match="leave"):
        inlay.attach(model, two, name="both", where=["q_proj"])
    with pytest.raises(UnsupportedError, match="by itself"):
        inlay.attach(model, inlay.Stack(two, LoRA(rank=2)), name="both")
    assert set(inlay.adapters(model)) == {"first", "second"}
