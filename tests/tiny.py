"""Tiny bases with a tokenizer, as folders, and rows to train them on. Every parameter is random."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "cat",
    "dog",
    "runs",
    "sits",
    "on",
    "mat",
    "tree",
    "quickly",
    "red",
    "blue",
    "bird",
    "sang",
    "at",
    "dawn",
]
CONTEXT = 96
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}|{% endif %}{% endfor %}"
)


def tokenizer(*, chat: bool = True) -> Any:
    """A byte-level BPE of a few hundred tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def llama(folder: Path, *, dropout: float = 0.1, chat: bool = True) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        attention_dropout=dropout,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return _saved(LlamaForCausalLM(config), folder, chat=chat)


def bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        pad_token_id=1,
    )
    return _saved(BertModel(config), folder)


def t5(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=320,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        pad_token_id=1,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    return _saved(T5ForConditionalGeneration(config), folder)


def _saved(model: Any, folder: Path, *, chat: bool = True) -> Path:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms near one and wide weights: in a model that hardly looks at its input nothing can be told apart.
            scale = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if scale else 0.0, 0.1 if scale else 0.3, generator=generator)
    model.save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return folder


def sentence(draw: random.Random, most: int = 10) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(2, most)))


def rows(kind: str, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one kind of data, all different."""
    draw = random.Random(seed)
    texts = [f"{sentence(draw)} {i}" for i in range(count)]
    match kind:
        case "completion":
            return [{"prompt": text, "completion": text.upper()} for text in texts]
        case "classification":
            return [{"text": text, "label": "yes" if "cat" in text else "no"} for text in texts]
        case "regression":
            return [{"text": text, "label": len(text) / 7} for text in texts]
        case "chat":
            said = [{"role": "user", "content": "hi"}]
            return [{"messages": [*said, {"role": "assistant", "content": text}]} for text in texts]
    return [{"text": text} for text in texts]


def jsonl(path: Path, kind: str = "completion", count: int = 40, *, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(kind, count, seed=seed)), encoding="utf-8")
    return path
