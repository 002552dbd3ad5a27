"""Prompt tuning equals concatenating the vectors by hand in front of the embedded input of the bare base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.testing.models import ZOO
from tests.golden.hand import agree, close, cotangent, inputs, numbers, shake, zoo_model

LENGTH = 3
KEY = "prompt/prompt/vectors"
DECODERS = ["llama", "qwen3", "gpt2", "opt", "mixtral", "gpt-neox", "phi3"]
SLIDING = ["gemma2", "gemma3"]  # window 8
ENCODERS = ["bert", "roberta", "distilbert"]


def attached(name: str) -> tuple[Any, inlay.Adapter]:
    model = zoo_model(name)
    return model, shake(inlay.attach(model, inlay.PromptTuning(length=LENGTH)))


def in_front(model: Any, vectors: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings, mask and positions of the concatenated sequence."""
    text = model.get_input_embeddings()(batch["input_ids"])
    rows = text.shape[0]
    mask = batch["attention_mask"]
    whole = {
        "inputs_embeds": torch.cat([vectors.expand(rows, -1, -1), text], dim=1),
        "attention_mask": torch.cat([mask.new_ones((rows, LENGTH)), mask], dim=1),
    }
    if "position_ids" in batch:
        ahead = torch.arange(LENGTH).expand(rows, LENGTH)
        whole["position_ids"] = torch.cat([ahead, batch["position_ids"] + LENGTH], dim=1)
    return whole


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, side: str) -> None:
    batch = inputs(name, ragged=True, side=side)
    model, adapter = attached(name)
    leaves = numbers(adapter)
    bare: Any = zoo_model(name)
    real = batch["attention_mask"].bool()
    actual = model(**batch).logits
    assert actual.shape[1] == batch["input_ids"].shape[1]
    expected = bare(**in_front(bare, leaves[KEY], batch)).logits[:, LENGTH:]
    agree(adapter, actual[real], expected[real], leaves)


@pytest.mark.parametrize("name", SLIDING)
def test_decoder_with_a_sliding_window_that_holds_the_whole_sequence(name: str) -> None:
    batch = {key: value[:, :4] for key, value in inputs(name).items()}
    model, adapter = attached(name)
    leaves = numbers(adapter)
    bare: Any = zoo_model(name)
    expected = bare(**in_front(bare, leaves[KEY], batch)).logits[:, LENGTH:]
    agree(adapter, model(**batch).logits, expected, leaves)


@pytest.mark.parametrize("name", SLIDING)
def test_a_sliding_window_that_would_cut_the_prompt_is_refused(name: str) -> None:
    model, _ = attached(name)
    with pytest.raises(inlay.UserError, match="window"):
        model(**inputs(name))


def test_decoder_without_a_mask() -> None:
    batch = inputs("llama")
    del batch["attention_mask"]
    model, adapter = attached("llama")
    leaves = numbers(adapter)
    bare: Any = ZOO["llama"].build()
    text = bare.get_input_embeddings()(batch["input_ids"])
    whole = torch.cat([leaves[KEY].expand(text.shape[0], -1, -1), text], dim=1)
    agree(adapter, model(**batch).logits, bare(inputs_embeds=whole).logits[:, LENGTH:], leaves)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_classifier_of_a_decoder_reads_the_last_real_token(side: str) -> None:
    name = "llama-classifier"
    batch = inputs(name, ragged=True, side=side)
    model, adapter = attached(name)
    leaves = numbers(adapter)
    bare: Any = zoo_model(name)
    hidden = bare.model(**in_front(bare, leaves[KEY], batch)).last_hidden_state[:, LENGTH:]
    places = batch["attention_mask"] * torch.arange(hidden.shape[1])
    expected = bare.score(hidden[torch.arange(hidden.shape[0]), places.argmax(1)])
    agree(adapter, model(**batch).logits, expected, leaves)


def test_the_loss_scores_the_text_only() -> None:
    batch = ZOO["llama"].batch(3, 3, True)
    model, adapter = attached("llama")
    bare: Any = ZOO["llama"].build()
    whole = in_front(bare, numbers(adapter)[KEY], batch)
    labels = torch.cat([batch["labels"].new_full((3, LENGTH), -100), batch["labels"]], dim=1)
    logits = bare(**whole).logits
    # The last virtual token would predict the first real one; inlay's text has nobody in front of it.
    labels[:, LENGTH] = -100
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    )
    close(model(**batch).loss, expected)


def _encode(name: str, bare: Any, whole: dict[str, Tensor]) -> Tensor:
    """The classifier on the text part of the concatenated sequence."""
    if name == "bert":
        hidden = bare.bert(**whole).last_hidden_state[:, LENGTH:]
        return bare.classifier(bare.bert.pooler(hidden))
    if name == "roberta":
        return bare.classifier(bare.roberta(**whole).last_hidden_state[:, LENGTH:])
    hidden = bare.distilbert(**whole).last_hidden_state[:, LENGTH:]
    return bare.classifier(torch.relu(bare.pre_classifier(hidden[:, 0])))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name: str) -> None:
    batch = inputs(name, ragged=True)
    model, adapter = attached(name)
    leaves = numbers(adapter)
    bare: Any = zoo_model(name)
    expected = _encode(name, bare, in_front(bare, leaves[KEY], batch))
    agree(adapter, model(**batch).logits, expected, leaves)


def test_encoder_with_token_types_and_positions() -> None:
    batch = inputs("bert", ragged=True)
    types = (torch.arange(batch["input_ids"].shape[1]) > 4).long().expand_as(batch["input_ids"])
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    model, adapter = attached("bert")
    leaves = numbers(adapter)
    bare: Any = ZOO["bert"].build()
    whole = in_front(bare, leaves[KEY], {**batch, "position_ids": positions})
    whole["token_type_ids"] = torch.cat([types.new_zeros((types.shape[0], LENGTH)), types], dim=1)
    actual = model(**batch, token_type_ids=types, position_ids=positions).logits
    agree(adapter, actual, _encode("bert", bare, whole), leaves)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder(name: str) -> None:
    batch = inputs(name, ragged=True)
    model, adapter = attached(name)
    leaves = numbers(adapter)
    bare: Any = zoo_model(name)
    whole = in_front(bare, leaves[KEY], batch)
    expected = bare(**whole, decoder_input_ids=batch["decoder_input_ids"])
    actual = model(**batch)
    close(actual.encoder_last_hidden_state, expected.encoder_last_hidden_state[:, LENGTH:])
    agree(adapter, actual.logits, expected.logits, leaves)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt-neox", "mixtral"])
def test_generation(name: str, cached: bool, beams: int) -> None:
    batch = ZOO[name].prompts(3, 2, ragged=True)
    model, adapter = attached(name)
    bare: Any = zoo_model(name)
    settings: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "num_beams": beams, "use_cache": cached,
    }  # fmt: skip
    whole = in_front(bare, numbers(adapter)[KEY].detach(), batch)
    expected = bare.generate(**whole, **settings)
    actual = model.generate(**batch, **settings)
    assert actual[:, batch["input_ids"].shape[1] :].tolist() == expected.tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_of_an_encoder_decoder(name: str, cached: bool, beams: int) -> None:
    batch = ZOO[name].prompts(3, 2, ragged=True)
    model, adapter = attached(name)
    bare: Any = zoo_model(name)
    settings: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "num_beams": beams, "use_cache": cached,
    }  # fmt: skip
    whole = in_front(bare, numbers(adapter)[KEY].detach(), batch)
    assert model.generate(**batch, **settings).tolist() == bare.generate(**whole, **settings).tolist()


def test_one_training_step_moves_the_vectors_alone() -> None:
    model, adapter = attached("bert")
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    out = model(**inputs("bert")).logits
    (out * cotangent(out)).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert adapter.count == LENGTH * 32
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
