"""Scores that are computed when something looks at them are those of the call, wherever they are looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay import LoRA
from inlay.core.errors import UnsupportedError
from inlay.kernels import labelled_loss
from inlay.kernels.lazy import LazyTensor
from inlay.testing.models import ZOO

SPECIMEN = ZOO["llama"]


@pytest.fixture
def short() -> tuple[Any, dict[str, Tensor]]:
    """A model that computes its loss the short way, and a batch."""
    model = SPECIMEN.build()
    torch.manual_seed(0)
    adapter = inlay.attach(model, LoRA(rank=2), where="all-linear")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1)
    batch = SPECIMEN.batch(rows=2, seed=0)
    assert isinstance(model(**batch).logits, LazyTensor)
    return model, batch


def taken(model: Any) -> Tensor:
    """The adapter's gradients, which are cleared."""
    parameters = list(inlay.adapters(model)["default"].parameters())
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_masked_language_model_keeps_its_loss(seed: int) -> None:
    """Of fresh weights, where every pairing of positions and labels has nearly the same loss."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = BertForMaskedLM(BertConfig(vocab_size=1000, **sizes)).eval()
    ids = torch.randint(3, 1000, (4, 24))
    labels = ids.masked_fill(torch.rand(ids.shape) > 0.15, -100)
    expected = model(input_ids=ids, labels=labels).loss
    inlay.attach(model, LoRA(rank=2), where="all-linear")
    for _ in range(2):
        torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, expected)


def test_scores_that_were_looked_at_without_gradients_have_them(short: Any) -> None:
    model, batch = short
    gradients = []
    for look in (False, True):
        out = model(**batch)
        if look:
            with torch.no_grad():
                assert out.logits.argmax(-1).shape == batch["labels"].shape
        (out.loss + out.logits.square().mean()).backward()
        gradients.append(taken(model))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().sum() > 0


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * 2 * x / x.numel()


def through_checkpoint(reentrant: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.utils.checkpoint.checkpoint(lambda s: s.square().mean(), x, use_reentrant=reentrant)


@pytest.mark.parametrize(
    "beneath",
    [lambda x: Squares.apply(x), through_checkpoint(True), through_checkpoint(False)],
    ids=["function", "reentrant checkpoint", "checkpoint"],
)
def test_scores_given_to_what_takes_tensors_beneath_python(short: Any, beneath: Callable[[Tensor], Tensor]) -> None:
    model, batch = short
    gradients = []
    for penalty in (lambda x: x.square().mean(), beneath):
        out = model(**batch)
        (out.loss + penalty(out.logits)).backward()
        gradients.append(taken(model))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_scores_are_those_of_the_call(short: Any) -> None:
    model, batch = short
    first = model(**batch)
    expected = first.logits.clone()
    late = model(**batch)
    copied = inlay.attach(model, LoRA(rank=1), name="other", modules_to_save=["lm_head"])
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.normal_()
    with inlay.use(model, "other"):
        torch.testing.assert_close(late.logits.clone(), expected)
    inlay.detach(model, "other")
    changed = model(**batch)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(UnsupportedError, match="output head was changed"):
        changed.logits.sum()


@pytest.mark.parametrize("what", ["hook", "backward hook", "forward", "parametrization"])
def test_what_is_put_on_the_head_later_counts(short: Any, what: str) -> None:
    model, batch = short
    once = model(**batch)
    head, seen = model.lm_head, []
    if what == "hook":
        head.register_forward_hook(lambda module, args, out: out * 0)
    elif what == "backward hook":
        head.register_full_backward_hook(lambda *_: seen.append(1))
    elif what == "forward":
        own = head.forward
        head.forward = lambda x: own(x) * 0
    else:

        class Nothing(torch.nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight * 0

        torch.nn.utils.parametrize.register_parametrization(head, "weight", Nothing(), unsafe=True)
    out = model(**batch)
    out.loss.backward()
    if what == "backward hook":
        assert seen
        torch.testing.assert_close(out.loss, once.loss)
    else:
        torch.testing.assert_close(out.loss, torch.tensor(float(head.out_features)).log())


def test_a_batch_without_labels_decides_nothing(short: Any) -> None:
    model, batch = short
    labelled_loss.forget(model)
    blank = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    model(**blank)
    assert isinstance(model(**batch).logits, LazyTensor)
