"""Trained numbers equal the papers' published counts, on models of the papers' sizes without their weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers

import inlay
from inlay import IA3, DoRA, FullFineTuning, Houlsby, LoRA, PrefixTuning, PromptTuning

# T0 is T5 v1.1; its 11B model has the shape of T5 v1.1 XXL.
T5: dict[str, Any] = {
    "d_kv": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-3 175B": (
        "GPT2LMHeadModel",
        {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "vocab_size": 50257},
    ),
    "GPT-2 M": ("GPT2LMHeadModel", {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "GPT-2 L": ("GPT2LMHeadModel", {"n_layer": 36, "n_embd": 1280, "n_head": 20}),
    "RoBERTa-base": ("RobertaForMaskedLM", {"vocab_size": 50265, "max_position_embeddings": 514}),
    "RoBERTa-large": (
        "RobertaForMaskedLM",
        {
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "BERT-base": ("BertForSequenceClassification", {}),
    "T0-3B": ("T5ForConditionalGeneration", {**T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32}),
    "T0-11B": ("T5ForConditionalGeneration", {**T5, "d_model": 4096, "d_ff": 10240, "num_heads": 64}),
    "Llama-3.2-3B": (
        "LlamaForCausalLM",
        {
            "hidden_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        },
    ),
}
QV = ("query", "value")
COUNTS: list[tuple[str, Any, dict[str, Any], int]] = [
    ("GPT-3 175B", LoRA(rank=1), {}, 4_718_592),
    ("GPT-3 175B", LoRA(rank=2), {"where": ["value"]}, 4_718_592),
    ("GPT-3 175B", LoRA(rank=8), {}, 37_748_736),
    ("RoBERTa-base", LoRA(rank=8), {}, 294_912),
    ("RoBERTa-large", LoRA(rank=8), {}, 786_432),
    ("GPT-2 M", LoRA(rank=4), {}, 393_216),
    ("GPT-2 L", LoRA(rank=4), {}, 737_280),
    ("GPT-2 M", PrefixTuning(length=5, projection=None), {}, 245_760),
    ("GPT-2 M", PrefixTuning(length=10, projection=None), {}, 491_520),
    ("BERT-base", Houlsby(bottleneck=64), {}, 2_379_264),
    ("BERT-base", IA3(), {}, 55_296),
    ("T0-11B", PromptTuning(length=5, init="random"), {}, 20_480),
    ("T0-11B", PromptTuning(length=100, init="random"), {}, 409_600),
    ("T0-3B", IA3(), {}, 540_672),
    ("T0-11B", IA3(), {}, 1_081_344),
    ("Llama-3.2-3B", LoRA(rank=32), {}, 9_175_040),
    ("Llama-3.2-3B", LoRA(rank=64, rank_stabilised=True), {}, 18_350_080),
    ("Llama-3.2-3B", DoRA(rank=32), {"where": QV}, 9_289_728),
    ("Llama-3.2-3B", IA3(), {}, 286_720),
    ("Llama-3.2-3B", PrefixTuning(length=50, projection=None), {}, 2_867_200),
    ("Llama-3.2-3B", PrefixTuning(length=200, projection=None), {}, 11_468_800),
    ("Llama-3.2-3B", PromptTuning(length=200, init="random"), {}, 614_400),
    ("RoBERTa-base", inlay.VeRA(rank=1024), {}, 43_008),
    ("RoBERTa-large", inlay.VeRA(rank=256), {}, 61_440),
    ("Llama-3.2-3B", inlay.VeRA(rank=256), {}, 129_024),
    ("Llama-3.2-3B", inlay.LoHa(rank=32), {}, 18_350_080),
    ("Llama-3.2-3B", inlay.LoKr(rank=32, factor=4), {}, 2_294_656),
    ("Llama-3.2-3B", inlay.OFT(blocks=32), {}, 8_171_520),
    ("Llama-3.2-3B", FullFineTuning(), {}, 3_212_749_824),
]


@cache
def weightless(name: str) -> Any:
    cls, settings = MODELS[name]
    model_class: Any = getattr(transformers, cls)
    with torch.device("meta"):
        return model_class(model_class.config_class(**settings))


@pytest.mark.parametrize("name, method, where, count", COUNTS, ids=[f"{n}-{m.name}-{c}" for n, m, _, c in COUNTS])
def test_count(name: str, method: Any, where: dict[str, Any], count: int) -> None:
    model = weightless(name)
    adapter = inlay.attach(model, method, **where)
    try:
        assert adapter.count == count
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert all(p.is_meta for p in adapter.parameters())
    finally:
        inlay.detach(model, "default")
    assert inlay.adapters(model) == {}
