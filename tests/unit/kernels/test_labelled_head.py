"""The short way from hidden states to the loss is the long way, and steps aside where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.kernels import cross_entropy, labelled_loss
from inlay.kernels.labelled_loss import LabelledLoss, naive
from inlay.kernels.lazy import LazyTensor
from inlay.testing.models import ZOO

SHORT = ("llama", "gemma2", "gpt2", "opt", "mixtral", "t5")
LONG = ("bart",)  # adds a bias over the vocabulary to its scores


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches the short way off, and on again."""

    def switch(off: bool) -> None:
        labelled_loss._SEEN.clear()
        monkeypatch.setattr(labelled_loss, "_agree", (lambda *_: False) if off else agree)

    agree = labelled_loss._agree
    return switch


def attached(name: str) -> tuple[Any, dict[str, Tensor], list[Any]]:
    specimen = ZOO[name]
    model = specimen.build()
    torch.manual_seed(0)
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    batch = specimen.batch(3, 1, ragged=True)
    batch["labels"][0, 1:5] = -100
    return model, batch, list(adapter.parameters())


def step(model: Any, batch: dict[str, Any], parameters: list[Any]) -> tuple[Any, list[Tensor]]:
    for parameter in parameters:
        parameter.grad = None
    out = model(**batch)
    out.loss.backward()
    return out, [p.grad.clone() for p in parameters]


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("name", [*SHORT, *LONG])
def test_loss_gradients_and_scores(name: str, items: int | None, long_way: Any) -> None:
    model, batch, parameters = attached(name)
    extra = {} if items is None or name == "t5" else {"num_items_in_batch": torch.tensor(items)}
    long_way(True)
    expected, gradients = step(model, {**batch, **extra}, parameters)
    assert not isinstance(expected.logits, LazyTensor)
    long_way(False)
    found, ours = step(model, {**batch, **extra}, parameters)
    assert isinstance(found.logits, LazyTensor) == (name in SHORT)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours, gradients, atol=1e-6, rtol=1e-4)
    assert found.logits.shape == expected.logits.shape
    torch.testing.assert_close(found.logits + 0, expected.logits + 0)


def test_gradients_reach_through_the_scores(long_way: Any) -> None:
    """A caller may pass labels and yet make a loss of the scores."""
    model, batch, parameters = attached("llama")
    long_way(True)
    expected = torch.autograd.grad(model(**batch).logits.square().mean(), parameters)
    long_way(False)
    torch.testing.assert_close(torch.autograd.grad(model(**batch).logits.square().mean(), parameters), expected)


def test_an_adapted_head_takes_the_long_way() -> None:
    model, batch, _ = attached("llama")
    inlay.attach(model, inlay.LoRA(rank=2), name="head", where=["lm_head"])
    assert not isinstance(model(**batch).logits, LazyTensor)
    with inlay.use(model, "default"):
        assert isinstance(model(**batch).logits, LazyTensor)


def test_a_loss_of_the_models_own_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = attached("llama")
    own = model.loss_function
    monkeypatch.setattr(type(model), "loss_function", property(lambda _: lambda *a, **k: own(*a, **k) * 1.1))
    assert not isinstance(model(**batch).logits, LazyTensor)


def test_a_loss_put_in_later_is_computed() -> None:
    """One that agrees on the tokens of the trial and on no others."""
    model, batch, _ = attached("llama")
    own, ids = model.loss_function, torch.full_like(batch["input_ids"], 7)
    assert isinstance(model(**batch).logits, LazyTensor)
    model.loss_function = lambda logits, labels, **given: own(logits, labels, **given) * (1 + (labels == 7).sum())
    expected = own(model(ids).logits, ids, model.config.vocab_size) * (1 + ids.numel())
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)


def test_another_index_that_is_ignored() -> None:
    """Given in the call; the first batch holds none of it."""
    model, batch, _ = attached("llama")
    ids = batch["input_ids"].clamp(min=6)
    for tokens in (ids, torch.cat([ids[:, :3], torch.full_like(ids[:, 3:], 5)], 1)):
        out = model(input_ids=tokens, labels=tokens, ignore_index=5)
        scores, labels = out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(scores, labels, ignore_index=5))


@pytest.mark.parametrize("named", [True, False])
def test_the_loads_of_experts_stay_in_the_loss(named: bool) -> None:
    """A thousandth of a small number: less than the trial tells apart."""
    model, batch, _ = attached("mixtral")
    plain = model(**batch, return_dict=named)[0]
    for part in (model, model.model):
        part.config.output_router_logits = True
    expected = plain + model.config.router_aux_loss_coef * model(**batch).aux_loss
    assert expected != plain
    torch.testing.assert_close(model(**batch, return_dict=named)[0], expected, atol=1e-6, rtol=1e-6)
    labelled_loss.forget(model)
    torch.testing.assert_close(model(**batch, return_dict=named)[0], expected, atol=1e-6, rtol=1e-6)


def test_tokens_by_place() -> None:
    model, batch, _ = attached("llama")
    ids = batch["input_ids"]
    torch.testing.assert_close(model(ids, labels=ids).loss, model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_function_against_its_twin(factor: float, cap: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, width, vocabulary = 150, 16, 40_000  # more than one chunk
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.3
    target = torch.randint(vocabulary, (rows,), generator=generator)
    expected = naive(hidden, weight, None, target, factor, cap)
    found = LabelledLoss.apply(hidden, weight, None, target, factor, cap)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad(loss, hidden)[0] for loss in (found * 2, expected * 2))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_chunks_in_the_memory_of_the_first_and_half_precision(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks, the last smaller; blocks of two rows in float32, the last of one."""
    monkeypatch.setattr(labelled_loss, "FEWEST_ROWS", 5)
    monkeypatch.setattr(labelled_loss, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(cross_entropy, "LOGITS_IN_CACHE", 2 * 64)
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (13, 64))
    added = torch.randn(64, generator=generator).bfloat16() if bias else None
    target = torch.randint(64, (13,), generator=generator)
    exact = hidden.double().requires_grad_()
    expected = naive(exact, weight.double(), None if added is None else added.double(), target, 1.0, None)
    hidden.requires_grad_()
    found = LabelledLoss.apply(hidden, weight, added, target, 1.0, None)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.double(), expected.double(), rtol=5e-3, atol=0.0)
    one, other = (torch.autograd.grad(loss, x)[0] for loss, x in ((found, hidden), (expected, exact)))
    assert float((one.double() - other).norm()) <= 1e-2 * float(other.norm())
