"""A tiny base in a folder, adapters trained on nothing, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    whole = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, eos_token="<end>", pad_token="<pad>", chat_template=template
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    limits = {"vocab_size": len(words), "max_position_embeddings": 512}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(**sizes, **limits, eos_token_id=0, bos_token_id=0, pad_token_id=1, initializer_range=0.3)
    )
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random adapter of `base`, with the record that a training would leave; returns its folder."""
    from transformers import AutoModelForCausalLM

    def make(method: Any, *, seed: int = 1, **record: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(seed)
        for parameter in inlay.attach(model, method, name="tuned").parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp("adapter")
        inlay.save(model, "tuned", folder)
        if record:
            plain = {"prompt_template": "{prompt}", "separator": "\n", "kind": "completion", "labels": None}
            facts = {"task": "causal", "base": str(base), "columns": {}, "max_length": 256, "data": {}}
            (folder / "training.json").write_text(json.dumps({**plain, **facts, **record}))
        return folder

    return make


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `inlay` with the given words; returns the exit code, standard output and standard error."""
    from inlay.cli.main import main

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        written = capsys.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return run


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five rows of prompts and completions; two share a prompt."""
    texts = [("a cat", "sat"), ("a dog", "ran"), ("a cat", "slept"), ("a bird", "flew off"), ("x", "y")]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in texts))
    return path
