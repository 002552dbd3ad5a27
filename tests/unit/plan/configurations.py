"""Published configurations, as their config.json has them, reduced to what gives a model its size."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float16", "tie_word_embeddings": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-70B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "LLaMA-65B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "Llama-2-13B": {
        **LLAMA,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "GPT-3-175B": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 96,
        "n_embd": 12288,
        "n_head": 96,
        "n_positions": 2048,
        "vocab_size": 50257,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
}


def config_of(name: str) -> Any:
    values = dict(PUBLISHED[name])
    return AutoConfig.for_model(values.pop("model_type"), **values)
