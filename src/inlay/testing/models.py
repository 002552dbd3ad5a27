"""The zoo: tiny random models of every kind, on which the laws are tested.

    for specimen in ZOO.values():
        model = specimen.build()                       # a fresh copy, in eval mode
        batch = specimen.batch(rows=3, seed=0)         # keyword arguments of the model's forward
        logits = specimen.logits(model(**batch))

They differ in what methods get wrong: grouped and fused projections, (in, out) kernels, rows flattened
before a layer, experts in one tensor, sliding windows and capped logits, learnt, rotary, relative and
no positions, attention inside and outside transformers' interface, cross-attention, convolutions.

A third party's method is tested on the same models, and a third party's model joins by making its
own `Specimen`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from inlay.testing.specimen import BOS, CLASSES, EOS, IMAGE, PAD, VOCABULARY, Specimen

__all__ = ["ZOO", "Specimen"]

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, **SPECIAL, **GROUPED))


def _llama_classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(**SIZES, **SPECIAL, **GROUPED, num_labels=CLASSES, attention_bias=True, mlp_bias=True)
    return LlamaForSequenceClassification(config)


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **SPECIAL, **GROUPED, head_dim=12, tie_word_embeddings=True))


def _gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**SIZES, **SPECIAL, **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    return Gemma2ForCausalLM(config)


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **SIZES,
        **SPECIAL,
        **GROUPED,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=56,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL,
    )
    return GPT2LMHeadModel(config)


def _gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **SPECIAL, hidden_dropout=0.0, attention_dropout=0.0))


def _phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**SIZES, **SPECIAL, **GROUPED))


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
        **SPECIAL,
    )
    return OPTForCausalLM(config)


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, **SPECIAL, **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config)


def _bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **SPECIAL,
    )
    return BloomForCausalLM(config)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, **SPECIAL, **NO_DROPOUT, num_labels=CLASSES))


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(**SIZES, **SPECIAL, **NO_DROPOUT, type_vocab_size=1, num_labels=CLASSES)
    )


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        hidden_dim=56,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        num_labels=CLASSES,
        pad_token_id=PAD,
    )
    return DistilBertForSequenceClassification(config)


def _deberta_v2() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        **SIZES,
        **SPECIAL,
        **NO_DROPOUT,
        num_labels=CLASSES,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        pooler_dropout=0.0,
    )
    return DebertaV2ForSequenceClassification(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=56,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=56,
        decoder_ffn_dim=56,
        max_position_embeddings=64,
        dropout=0.0,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
        **SPECIAL,
    )
    return BartForConditionalGeneration(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE,
        patch_size=8,
        num_labels=CLASSES,
        **NO_DROPOUT,
    )
    return ViTForImageClassification(config)


def _sequential() -> nn.Module:
    # A group norm, because a batch norm makes the rows of a batch depend on each other.
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8 * (IMAGE // 4) ** 2, 24),
        nn.LayerNorm(24),
        nn.GELU(),
        nn.Linear(24, CLASSES),
    )


def _decoder(name: str, factory: Callable[[], nn.Module], **traits: Any) -> Specimen:
    given: dict[str, Any] = {
        "task": "causal",
        "supports_generate": True,
        "takes_positions": True,
        "padding_sides": ("left", "right"),
        **traits,
    }
    return Specimen(name=name, kind="decoder", factory=factory, **given)


def _encoder(name: str, factory: Callable[[], nn.Module], **traits: Any) -> Specimen:
    return Specimen(name=name, kind="encoder", task="classification", factory=factory, **traits)


ZOO: Mapping[str, Specimen] = {
    specimen.name: specimen
    for specimen in (
        _decoder("llama", _llama),
        _decoder("llama-classifier", _llama_classifier, task="classification", supports_generate=False),
        _decoder("qwen3", _qwen3),
        _decoder("gemma2", _gemma2),
        _decoder("gemma3", _gemma3),
        _decoder("gpt2", _gpt2),
        _decoder("gpt-neox", _gpt_neox),
        _decoder("phi3", _phi3),
        _decoder("opt", _opt),
        _decoder("mixtral", _mixtral),
        _decoder("bloom", _bloom, attention_interface=False, takes_positions=False),
        _encoder("bert", _bert, takes_positions=True),
        _encoder("roberta", _roberta),
        _encoder("distilbert", _distilbert),
        _encoder("deberta-v2", _deberta_v2, attention_interface=False, shares_projections=True),
        Specimen(
            name="t5",
            kind="seq2seq",
            task="seq2seq",
            factory=_t5,
            supports_generate=True,
            padding_sides=("left", "right"),
        ),
        Specimen(name="bart", kind="seq2seq", task="seq2seq", factory=_bart, supports_generate=True),
        Specimen(name="vit", kind="vision", task="classification", factory=_vit, padding_sides=()),
        Specimen(
            name="sequential",
            kind="plain",
            task="features",
            factory=_sequential,
            attention_interface=False,
            padding_sides=(),
        ),
    )
}
