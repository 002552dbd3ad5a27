"""The real encoder–decoder of Arabic–English transliteration, as a transformers model with a tokenizer.

The weights are CTranslate2's (OpenNMT): a pre-norm Transformer of width 32 with sinusoidal positions, source and
target vocabularies of single letters. Pegasus has the same architecture; its table of positions is overwritten with
the one the weights were trained with (positions from 1, sines and then cosines over 16 timescales), and both
vocabularies become one: letters of the source that the target lacks can be read and never written.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LETTERS = 64  # positions; the longest name has some thirty letters
PAD, START, END, UNKNOWN = "<blank>", "<s>", "</s>", "<unk>"
NEVER = -1e4  # added to the score of a letter that cannot be written


def convert(folder: Path, out: Path) -> Path:
    """Write the model of `folder` (``model.bin`` and two vocabularies) to `out`, unless it is there."""
    if (out / "config.json").exists():
        return out
    source, target = (_letters(folder / f"{n}_vocabulary.txt") for n in ("source", "target"))
    letters = list(dict.fromkeys([*source, *target]))
    model = _model(len(letters), letters)
    state = model.state_dict()
    _fill(state, _tensors(folder / "model.bin"), letters, source, target)
    model.load_state_dict(state)
    model.save_pretrained(out)
    _tokenizer(letters).save_pretrained(out)
    return out


def _letters(path: Path) -> list[str]:
    """A token a line, some of them separators to `str.splitlines`; the file leaves out the last, the unknown one."""
    return [*path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), UNKNOWN]


def _model(vocabulary: int, letters: list[str]) -> Any:
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    ids = {name: letters.index(token) for name, token in (("pad", PAD), ("bos", START), ("eos", END))}
    config = PegasusConfig(
        vocab_size=vocabulary, d_model=32, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=128, decoder_ffn_dim=128, activation_function="relu",
        max_position_embeddings=LETTERS, scale_embedding=True, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, tie_word_embeddings=False, decoder_start_token_id=ids["bos"],
        forced_eos_token_id=None, **{f"{n}_token_id": i for n, i in ids.items()},
    )  # fmt: skip
    return PegasusForConditionalGeneration(config).eval()


def _tokenizer(letters: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END, unk_token=UNKNOWN,
        model_max_length=LETTERS, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _fill(
    state: dict[str, Tensor], given: dict[str, Tensor], letters: list[str], source: list[str], target: list[str]
) -> None:
    read, written = [letters.index(x) for x in source], [letters.index(x) for x in target]
    state["model.encoder.embed_tokens.weight"].zero_()[read] = given["encoder/embeddings/weight"]
    state["model.decoder.embed_tokens.weight"].zero_()[written] = given["decoder/embeddings/weight"]
    state["model.shared.weight"].copy_(state["model.encoder.embed_tokens.weight"])
    state["lm_head.weight"].zero_()[written] = given["decoder/projection/weight"]
    state["final_logits_bias"].fill_(NEVER)[0, written] = given["decoder/projection/bias"]
    for stack in ("encoder", "decoder"):
        state[f"model.{stack}.embed_positions.weight"].copy_(_positions())
        _norm(state, given, f"model.{stack}.layer_norm", f"{stack}/layer_norm")
        for layer in range(6):
            ours, theirs = f"model.{stack}.layers.{layer}", f"{stack}/layer_{layer}"
            _split(state, given, f"{ours}.self_attn", f"{theirs}/self_attention", (("q", "k", "v"), ("out",)))
            _norm(state, given, f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            if stack == "decoder":
                _split(state, given, f"{ours}.encoder_attn", f"{theirs}/attention", (("q",), ("k", "v"), ("out",)))
                _norm(state, given, f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
            for i in (0, 1):
                for part in ("weight", "bias"):
                    state[f"{ours}.fc{i + 1}.{part}"].copy_(given[f"{theirs}/ffn/linear_{i}/{part}"])
            _norm(state, given, f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")


def _split(state: dict[str, Tensor], given: dict[str, Tensor], ours: str, theirs: str, fused: Any) -> None:
    for i, names in enumerate(fused):
        for part in ("weight", "bias"):
            for name, piece in zip(names, given[f"{theirs}/linear_{i}/{part}"].chunk(len(names)), strict=True):
                state[f"{ours}.{name}_proj.{part}"].copy_(piece)


def _norm(state: dict[str, Tensor], given: dict[str, Tensor], ours: str, theirs: str) -> None:
    state[f"{ours}.weight"].copy_(given[f"{theirs}/gamma"])
    state[f"{ours}.bias"].copy_(given[f"{theirs}/beta"])


def _positions() -> Tensor:
    """Codes of positions 1, 2, …: (positions, 32)."""
    angles = torch.arange(1, LETTERS + 1)[:, None] * torch.exp(-torch.arange(16) * math.log(10_000) / 15)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _tensors(path: Path) -> dict[str, Tensor]:
    """CTranslate2's binary version 2: see the data's SOURCE.md."""
    raw, at = path.read_bytes(), 0

    def take(format: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from("<" + format, raw, at)
        at += struct.calcsize("<" + format)
        return values

    def text() -> str:
        nonlocal at
        (length,) = take("H")
        at += length
        return raw[at - length : at - 1].decode()

    take("I"), text()
    _, count = take("II")
    found = {}
    for _ in range(count):
        name = text()
        (rank,) = take("B")
        shape = take(f"{rank}I")
        _, items = take("BI")
        found[name] = torch.from_numpy(np.frombuffer(raw, np.float32, items, at).reshape(shape).copy())
        at += 4 * items
    return found
