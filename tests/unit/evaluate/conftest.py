"""Tiny models with every parameter random, and a tokenizer of one token a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

WORDS = ["<pad>", "</s>", "<s>", *(f"w{n}" for n in range(61))]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", eos_token="</s>", bos_token="<s>", padding_side="right"
    )


def _random(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model.eval()


def _decoder_sizes() -> dict[str, int]:
    return {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def causal(request: pytest.FixtureRequest) -> Any:
    """Rotary positions, and absolute ones, which a wrong padding shifts."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if request.param == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=48, **_decoder_sizes())
        return _random(GPT2LMHeadModel(config))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(max_position_embeddings=48, **sizes, **_decoder_sizes())
    return _random(LlamaForCausalLM(config))


@pytest.fixture(scope="session", params=["t5", "bart"])
def seq2seq(request: pytest.FixtureRequest) -> Any:
    """T5 starts its decoder with padding, BART with the end-of-text token."""
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    if request.param == "t5":
        config = T5Config(
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            **_decoder_sizes(),
        )
        return _random(T5ForConditionalGeneration(config))
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = BartConfig(**sizes, **_decoder_sizes(), decoder_start_token_id=1, forced_eos_token_id=None)
    return _random(BartForConditionalGeneration(config))


def _tiny_llama(kind: str, **rest: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(max_position_embeddings=48, **sizes, **_decoder_sizes(), **rest)
    return _random(getattr(transformers, kind)(config))


@pytest.fixture(scope="session")
def one_causal() -> Any:
    return _tiny_llama("LlamaForCausalLM")


@pytest.fixture(scope="session")
def one_seq2seq() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return _random(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, **_decoder_sizes())))


@pytest.fixture(scope="session")
def classifier() -> Any:
    """A decoder's head reads the last real token, so it must know the padding."""
    return _tiny_llama("LlamaForSequenceClassification", num_labels=3)


@pytest.fixture(scope="session")
def regressor() -> Any:
    return _tiny_llama("LlamaForSequenceClassification", num_labels=1)
