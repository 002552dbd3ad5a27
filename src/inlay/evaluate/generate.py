"""Generating texts from prompts, in batches, with any mix of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from inlay.core.errors import ConfigError, DataError, problems
from inlay.evaluate.batches import by_length, evaluating, pad, padding_id
from inlay.evaluate.progress import Advance

Prompt = str | Sequence[int]
"""A text, or its token ids."""


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    temperature: float = 0.0,
    batch_size: int = 8,
    adapters: Sequence[str | None] | None = None,
    progress: Advance | None = None,
) -> list[str]:
    """Generate a text after each prompt (decoder-only) or in answer to it (encoder–decoder).

    Args:
        model: a transformers model that can generate, with or without adapters attached.
        tokenizer: its tokenizer; its settings are not changed.
        prompts: texts or token ids.
        max_new_tokens: most new tokens for each prompt; a text ends earlier at an end-of-text token.
        num_beams: number of beams; 1 is greedy search.
        temperature: above 0 the model samples (seed torch to make it repeatable).
        batch_size: rows at a time.
        adapters: for each prompt an adapter name, or None for the base; without the list, the active adapter.
        progress: called after each batch with the number of its rows.

    Returns:
        One text for each prompt, in order, without the prompt and without special tokens.

    Raises:
        ConfigError: options that are out of range or contradict each other.
        DataError: prompts that are empty, or leave no room in the model's context.
    """
    _check_settings(max_new_tokens, num_beams, temperature)
    if adapters is not None and len(adapters) != len(prompts):
        raise ConfigError(f"{len(adapters)} adapters for {len(prompts)} prompts; give one (or None) for each prompt")
    rows = [tokenizer(p).input_ids if isinstance(p, str) else list(p) for p in prompts]
    _check_room(model, [len(row) for row in rows], max_new_tokens)
    filler = padding_id(model, tokenizer)
    ends = end_tokens(model, tokenizer)
    settings = _generation_config(max_new_tokens, num_beams, temperature, filler, ends)
    seq2seq = bool(model.config.is_encoder_decoder)
    texts = [""] * len(rows)
    with evaluating(model) as device:
        for batch in by_length([len(row) for row in rows], batch_size):
            inputs = [rows[n] for n in batch]
            ids = pad(inputs, filler, "right" if seq2seq else "left")
            mask = pad([[1] * len(row) for row in inputs], 0, "right" if seq2seq else "left")
            with _choice(model, adapters, batch):
                written = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
                )
            # An encoder–decoder's output begins with its start token, a decoder's with the prompt.
            fresh = written[:, 1:] if seq2seq else written[:, ids.shape[1] :]
            for n, tokens in zip(batch, fresh.tolist(), strict=True):
                texts[n] = _decode(tokenizer, tokens, ends)
            if progress is not None:
                progress(len(batch))
    return texts


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text, from the model's generation settings and the tokenizer."""
    stated = model.generation_config.eos_token_id
    tokens = stated if isinstance(stated, list) else [stated]
    return list(dict.fromkeys(int(t) for t in [*tokens, tokenizer.eos_token_id] if t is not None))


def context_size(model: Any) -> int | None:
    """The number of tokens the model can read; None if its positions are relative or the limit is unknown."""
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(size) if size is not None and size > 0 else None


def _generation_config(max_new_tokens: int, beams: int, temperature: float, filler: int, ends: list[int]) -> Any:
    from transformers import GenerationConfig

    # Given even if it is the default: otherwise the model's own settings, often sampling, apply.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_p=1.0,
        top_k=0 if temperature > 0 else 50,
        pad_token_id=filler,
        eos_token_id=ends or None,
    )


def _decode(tokenizer: Any, tokens: list[int], ends: Sequence[int]) -> str:
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    text = tokenizer.decode(tokens[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def _choice(model: Any, adapters: Sequence[str | None] | None, batch: Sequence[int]) -> AbstractContextManager[Any]:
    if adapters is None:
        return nullcontext()
    import inlay

    choice: AbstractContextManager[Any] = inlay.use(model, [adapters[n] for n in batch])
    return choice


def _check_settings(max_new_tokens: int, num_beams: int, temperature: float) -> None:
    checks = [
        (max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; expected 1 or more"),
        (num_beams >= 1, f"num_beams is {num_beams}; expected 1 or more"),
        (0 <= temperature < float("inf"), f"temperature is {temperature}; expected 0 or more"),
        (num_beams == 1 or temperature == 0, "beam search does not sample; leave out num_beams or temperature"),
    ]
    wrong = [message for holds, message in checks if not holds]
    if wrong:
        raise ConfigError(problems("generation", wrong))


def _check_room(model: Any, lengths: Sequence[int], max_new_tokens: int) -> None:
    size = context_size(model)
    wrong = []
    for row, length in enumerate(lengths, 1):
        needed = length if model.config.is_encoder_decoder else length + max_new_tokens
        if length == 0:
            wrong.append(f"prompt {row} has no tokens; give at least one word")
        elif size is not None and needed > size:
            wrong.append(
                f"prompt {row} has {length} tokens and leaves no room for {max_new_tokens} new ones in the "
                f"model's context of {size}; shorten it or lower max_new_tokens"
            )
    if wrong:
        rest = [f"and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        raise DataError(problems("prompts", wrong[:20] + rest))
