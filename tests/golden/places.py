"""Where each role lies in the zoo's models, written by hand, and which rows of a fused matrix it means."""

from __future__ import annotations

import torch
from torch import Tensor

LAYERS = 2
_LLAMA = {
    "query": ["model.layers.{}.self_attn.q_proj"],
    "key": ["model.layers.{}.self_attn.k_proj"],
    "value": ["model.layers.{}.self_attn.v_proj"],
    "up": ["model.layers.{}.mlp.up_proj"],
    "down": ["model.layers.{}.mlp.down_proj"],
}
PLACES: dict[str, dict[str, list[str]]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "mixtral": {role: _LLAMA[role] for role in ("query", "key", "value")},
    "phi3": {
        "query": ["model.layers.{}.self_attn.qkv_proj:query"],
        "key": ["model.layers.{}.self_attn.qkv_proj:key"],
        "value": ["model.layers.{}.self_attn.qkv_proj:value"],
        "up": ["model.layers.{}.mlp.gate_up_proj"],
        "down": ["model.layers.{}.mlp.down_proj"],
    },
    "opt": {
        "query": ["model.decoder.layers.{}.self_attn.q_proj"],
        "key": ["model.decoder.layers.{}.self_attn.k_proj"],
        "value": ["model.decoder.layers.{}.self_attn.v_proj"],
        "up": ["model.decoder.layers.{}.fc1"],
        "down": ["model.decoder.layers.{}.fc2"],
    },
    "gpt2": {
        "query": ["transformer.h.{}.attn.c_attn:query"],
        "key": ["transformer.h.{}.attn.c_attn:key"],
        "value": ["transformer.h.{}.attn.c_attn:value"],
        "up": ["transformer.h.{}.mlp.c_fc"],
        "down": ["transformer.h.{}.mlp.c_proj"],
    },
    "gpt-neox": {
        "query": ["gpt_neox.layers.{}.attention.query_key_value:query"],
        "key": ["gpt_neox.layers.{}.attention.query_key_value:key"],
        "value": ["gpt_neox.layers.{}.attention.query_key_value:value"],
        "up": ["gpt_neox.layers.{}.mlp.dense_h_to_4h"],
        "down": ["gpt_neox.layers.{}.mlp.dense_4h_to_h"],
    },
    "bloom": {
        "query": ["transformer.h.{}.self_attention.query_key_value:query"],
        "key": ["transformer.h.{}.self_attention.query_key_value:key"],
        "value": ["transformer.h.{}.self_attention.query_key_value:value"],
        "up": ["transformer.h.{}.mlp.dense_h_to_4h"],
        "down": ["transformer.h.{}.mlp.dense_4h_to_h"],
    },
    "bert": {
        "query": ["bert.encoder.layer.{}.attention.self.query"],
        "key": ["bert.encoder.layer.{}.attention.self.key"],
        "value": ["bert.encoder.layer.{}.attention.self.value"],
        "up": ["bert.encoder.layer.{}.intermediate.dense"],
        "down": ["bert.encoder.layer.{}.output.dense"],
    },
    "distilbert": {
        "query": ["distilbert.transformer.layer.{}.attention.q_lin"],
        "key": ["distilbert.transformer.layer.{}.attention.k_lin"],
        "value": ["distilbert.transformer.layer.{}.attention.v_lin"],
        "up": ["distilbert.transformer.layer.{}.ffn.lin1"],
        "down": ["distilbert.transformer.layer.{}.ffn.lin2"],
    },
    "deberta-v2": {
        "query": ["deberta.encoder.layer.{}.attention.self.query_proj"],
        "key": ["deberta.encoder.layer.{}.attention.self.key_proj"],
        "value": ["deberta.encoder.layer.{}.attention.self.value_proj"],
        "up": ["deberta.encoder.layer.{}.intermediate.dense"],
        "down": ["deberta.encoder.layer.{}.output.dense"],
    },
    "t5": {
        "query": [
            "encoder.block.{}.layer.0.SelfAttention.q",
            "decoder.block.{}.layer.0.SelfAttention.q",
            "decoder.block.{}.layer.1.EncDecAttention.q",
        ],
        "key": [
            "encoder.block.{}.layer.0.SelfAttention.k",
            "decoder.block.{}.layer.0.SelfAttention.k",
            "decoder.block.{}.layer.1.EncDecAttention.k",
        ],
        "value": [
            "encoder.block.{}.layer.0.SelfAttention.v",
            "decoder.block.{}.layer.0.SelfAttention.v",
            "decoder.block.{}.layer.1.EncDecAttention.v",
        ],
        "up": [
            "encoder.block.{}.layer.1.DenseReluDense.wi_1",
            "decoder.block.{}.layer.2.DenseReluDense.wi_1",
        ],
        "down": ["encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"],
    },
    "bart": {
        "query": [
            "model.encoder.layers.{}.self_attn.q_proj",
            "model.decoder.layers.{}.self_attn.q_proj",
            "model.decoder.layers.{}.encoder_attn.q_proj",
        ],
        "key": [
            "model.encoder.layers.{}.self_attn.k_proj",
            "model.decoder.layers.{}.self_attn.k_proj",
            "model.decoder.layers.{}.encoder_attn.k_proj",
        ],
        "value": [
            "model.encoder.layers.{}.self_attn.v_proj",
            "model.decoder.layers.{}.self_attn.v_proj",
            "model.decoder.layers.{}.encoder_attn.v_proj",
        ],
        "up": ["model.encoder.layers.{}.fc1", "model.decoder.layers.{}.fc1"],
        "down": ["model.encoder.layers.{}.fc2", "model.decoder.layers.{}.fc2"],
    },
    "vit": {
        "query": ["vit.layers.{}.attention.q_proj"],
        "key": ["vit.layers.{}.attention.k_proj"],
        "value": ["vit.layers.{}.attention.v_proj"],
        "up": ["vit.layers.{}.mlp.fc1"],
        "down": ["vit.layers.{}.mlp.fc2"],
    },
}
TRANSPOSED = ("gpt2",)  # kernels stored as (in, out)


def places(name: str, *roles: str) -> dict[str, str]:
    """Site → role, over all layers."""
    return {
        pattern.format(layer): role
        for role in roles
        for pattern in PLACES[name].get(role, [])
        for layer in range(LAYERS)
    }


def rows_of(name: str, site: str) -> Tensor | None:
    """Which output rows of the layer's matrix a site means; None for all."""
    _, _, part = site.partition(":")
    if not part:
        return None
    which = ("query", "key", "value").index(part)
    if name == "gpt2":  # (q | k | v), 32 each
        return torch.arange(32) + 32 * which
    if name == "phi3":  # 4 query heads and 2 key heads of 8
        return (torch.arange(0, 32), torch.arange(32, 48), torch.arange(48, 64))[which]
    # GPT-NeoX and BLOOM: a head after another, each with its 8 query, 8 key and 8 value rows.
    return torch.cat([torch.arange(8) + 24 * head + 8 * which for head in range(4)])
