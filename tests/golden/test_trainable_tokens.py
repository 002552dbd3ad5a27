"""Trainable tokens against the bare model with changed rows, and against Hugging Face PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.core.errors import ConfigError, SelectionError, UnsupportedError
from inlay.testing.models import VOCABULARY, ZOO
from tests.golden.hand import agree, close, inputs, numbers, shake, with_weights, zoo_model

TOKENS = (40, 3, 7, 90, 21, 22, 23, 55, 56, 9)
TIED = ["qwen3", "gemma2", "gemma3", "gpt2", "opt", "bloom", "bart", "t5"]
# Head of its own → its matrix.
UNTIED = {"llama": "lm_head.weight", "gpt-neox": "lm_head.weight"}
HEADLESS = ["bert", "roberta", "llama-classifier"]


def replaced(value: Tensor, rows: Tensor) -> Tensor:
    """The matrix with new rows, by a product with a one-hot matrix."""
    chosen = torch.zeros(len(TOKENS), value.shape[0], dtype=value.dtype)
    for row, token in enumerate(TOKENS):
        chosen[row, token] = 1.0
    return value * (1 - chosen.sum(0))[:, None] + chosen.t() @ rows


def attached(name: str, *, head: bool = False) -> tuple[Any, inlay.Adapter, dict[str, Tensor]]:
    model = zoo_model(name)
    adapter = shake(inlay.attach(model, inlay.TrainableTokens(tokens=TOKENS, head=head)))
    return model, adapter, numbers(adapter)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", [*TIED, *UNTIED, *HEADLESS])
def test_equals_changed_rows(name: str, head: bool) -> None:
    batch = inputs(name, ragged=True)
    model, adapter, leaves = attached(name, head=head)
    bare = zoo_model(name)
    table: Any = bare.get_input_embeddings()  # type: ignore[operator]
    own = UNTIED.get(name, "")
    assert set(leaves) == {"shared/tokens/values"} | ({"shared/head/values"} if head and own else set())

    def changed(parameter: str, value: Tensor) -> Tensor:
        if value.data_ptr() == table.weight.data_ptr():
            return replaced(value, leaves["shared/tokens/values"])
        if head and parameter == own:
            return replaced(value, leaves["shared/head/values"])
        return value

    expected = with_weights(bare, changed, batch).logits
    actual = model(**batch).logits
    if actual.shape[:2] == batch["attention_mask"].shape:
        real = batch["attention_mask"].bool()
        actual, expected = actual[real], expected[real]
    agree(adapter, actual, expected, leaves, tolerance=2e-5)


def test_the_values_are_rows_in_the_order_given() -> None:
    model = ZOO["gemma3"].build()
    table = model.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
    adapter = inlay.attach(model, inlay.TrainableTokens(tokens=TOKENS))
    (values,) = adapter.tensors().values()
    assert torch.equal(values, table[list(TOKENS)])
    assert adapter.count == len(TOKENS) * table.shape[1]


@pytest.mark.parametrize("name", ["gemma2", "bart", "llama"])
def test_a_fresh_adapter_changes_no_bit_of_a_half_precision_model(name: str) -> None:
    batch, model = inputs(name), ZOO[name].build(dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(**batch).logits
        inlay.attach(model, inlay.TrainableTokens(tokens=TOKENS, head=True))
        assert torch.equal(model(**batch).logits, before)


def test_new_words_of_a_resized_vocabulary() -> None:
    model: Any = ZOO["qwen3"].build()
    new = (VOCABULARY, VOCABULARY + 2)
    with pytest.raises(SelectionError, match="resize_token_embeddings"):
        inlay.attach(model, inlay.TrainableTokens(tokens=new))
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    adapter = shake(inlay.attach(model, inlay.TrainableTokens(tokens=new)))
    ids = torch.tensor([[5, VOCABULARY, 8, VOCABULARY + 2]])
    out = model(input_ids=ids, labels=ids)
    assert out.logits.shape[-1] == VOCABULARY + 3
    (values,) = adapter.parameters()
    hidden = model.model(input_ids=ids).last_hidden_state
    close(out.logits[..., list(new)], hidden @ values.t())
    out.loss.backward()
    assert values.grad is not None and bool((values.grad != 0).any(1).all())


def test_merging_writes_the_rows() -> None:
    model, _, leaves = attached("gemma2")
    report = inlay.merge(model, "default")
    assert report.worst == 0.0
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert torch.equal(end.weight[list(TOKENS)], leaves["shared/tokens/values"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_peft(name: str) -> None:
    import peft

    model, _, leaves = attached(name)
    config = peft.TrainableTokensConfig(token_indices=list(TOKENS), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(zoo_model(name), config)
    (parameter,) = {id(p): p for p in theirs.parameters() if p.requires_grad}.values()
    with torch.no_grad():
        parameter.copy_(leaves["shared/tokens/values"])
        batch = inputs(name, ragged=True)
        real = batch["attention_mask"].bool()
        close(model(**batch).logits[real], theirs.eval()(**batch).logits[real])


def test_refusals() -> None:
    with pytest.raises(SelectionError, match="convert_tokens_to_ids"):
        inlay.attach(ZOO["llama"].build(), inlay.TrainableTokens())
    with pytest.raises(SelectionError, match="no `where`"):
        inlay.attach(ZOO["llama"].build(), inlay.TrainableTokens(tokens=(3,)), where="all-linear")
    with pytest.raises(ConfigError, match="twice"):
        inlay.TrainableTokens(tokens=(3, 3))
    with pytest.raises(ConfigError, match="negative"):
        inlay.TrainableTokens(tokens=(-1,))
    with pytest.raises(UnsupportedError, match="no table"):
        inlay.attach(ZOO["vit"].build(), inlay.TrainableTokens(tokens=(3,)))
