from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import inlay
from inlay.core.errors import ConfigError, DataError
from inlay.evaluate.generate import context_size, generate_texts

PROMPTS = ["w1 w2 w3", "w9", "w4 w4 w5 w6 w7 w8", "w30 w2", "w11 w12 w13 w14"]


def one_by_one(model: Any, tokenizer: Any, prompt: str, tokens: int, **settings: Any) -> str:
    """transformers' own generation of a single row without padding, cut at the end-of-text token."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    new = out[0, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
    end = new.index(1) if 1 in new else len(new)
    return str(tokenizer.decode(new[:end], skip_special_tokens=True))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_ragged_batch_equals_one_row_at_a_time(causal: Any, tokenizer: Any, beams: int) -> None:
    found = generate_texts(causal, tokenizer, PROMPTS, max_new_tokens=9, num_beams=beams, batch_size=2)
    assert found == [one_by_one(causal, tokenizer, p, 9, num_beams=beams) for p in PROMPTS]
    assert len(set(found)) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_decoder_too(seq2seq: Any, tokenizer: Any, beams: int) -> None:
    found = generate_texts(seq2seq, tokenizer, PROMPTS, max_new_tokens=9, num_beams=beams, batch_size=2)
    assert found == [one_by_one(seq2seq, tokenizer, p, 9, num_beams=beams) for p in PROMPTS]


def test_token_ids_are_as_good_as_a_text(causal: Any, tokenizer: Any) -> None:
    ids = [tokenizer(p).input_ids for p in PROMPTS]
    assert generate_texts(causal, tokenizer, ids, max_new_tokens=5) == generate_texts(
        causal, tokenizer, PROMPTS, max_new_tokens=5
    )


def test_it_stops_at_the_end_token_and_leaves_it_out(causal: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(causal)
    ids = tokenizer(PROMPTS[0]).input_ids
    third = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0, -1]
    model.generation_config.eos_token_id = [int(third)]
    (found,) = generate_texts(model, tokenizer, [PROMPTS[0]], max_new_tokens=9)
    assert len(found.split()) <= 2


def test_modes_and_settings_are_left_as_they_were(causal: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(causal).train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
    frozen.eval()
    modes, settings = [m.training for m in model.modules()], model.generation_config.to_dict()
    tokenizer.padding_side = "right"
    generate_texts(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert [m.training for m in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert tokenizer.padding_side == "right"


def test_a_model_that_samples_by_default_is_greedy_here_without_a_warning(causal: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(causal)
    expected = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6)
    model.generation_config.update(do_sample=True, temperature=3.0, top_p=0.9, top_k=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6) == expected


def test_sampling_follows_the_seed(causal: Any, tokenizer: Any) -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(generate_texts(causal, tokenizer, PROMPTS, max_new_tokens=9, temperature=2.0))
    assert draws[0] == draws[1] != draws[2]


def test_prompts_without_room_are_all_named(causal: Any, tokenizer: Any) -> None:
    long = " ".join(["w1"] * 45)
    with pytest.raises(DataError) as caught:
        generate_texts(causal, tokenizer, ["w1", long, ""], max_new_tokens=8)
    assert "prompt 2 has 45 tokens" in str(caught.value) and "context of 48" in str(caught.value)
    assert "prompt 3 has no tokens" in str(caught.value)
    assert context_size(causal) == 48


def test_settings_that_cannot_be_are_listed_together(causal: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        generate_texts(causal, tokenizer, ["w1"], max_new_tokens=0, num_beams=0)
    with pytest.raises(ConfigError, match="does not sample"):
        generate_texts(causal, tokenizer, ["w1"], max_new_tokens=2, num_beams=2, temperature=1.0)
    with pytest.raises(ConfigError, match="1 adapters for 2 prompts"):
        generate_texts(causal, tokenizer, ["w1", "w2"], adapters=["a"])
    with pytest.raises(ConfigError, match="batch size 0"):
        generate_texts(causal, tokenizer, ["w1"], max_new_tokens=2, batch_size=0)


def test_progress_counts_every_row(causal: Any, tokenizer: Any) -> None:
    seen: list[int] = []
    generate_texts(causal, tokenizer, PROMPTS, max_new_tokens=1, batch_size=2, progress=seen.append)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("beams", [1, 3])
def test_each_prompt_has_its_own_adapter(causal: Any, tokenizer: Any, beams: int) -> None:
    model = copy.deepcopy(causal)
    torch.manual_seed(0)
    for name, method in (("low", inlay.LoRA(rank=2)), ("prefix", inlay.PrefixTuning(length=3))):
        for parameter in inlay.attach(model, method, name=name).parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    chosen = ["low", None, "prefix", "low", "prefix"]
    found = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=7, num_beams=beams, adapters=chosen, batch_size=3)
    for prompt, name, text in zip(PROMPTS, chosen, found, strict=True):
        with inlay.use(model, name):
            assert [text] == generate_texts(model, tokenizer, [prompt], max_new_tokens=7, num_beams=beams)
    assert found != generate_texts(causal, tokenizer, PROMPTS, max_new_tokens=7, num_beams=beams)
