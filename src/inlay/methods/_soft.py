"""Sources from which soft prompts are initialised: the base's embeddings, common words, words of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.authoring import ConfigError, ModelView, UnsupportedError, bare

COMMON = 5_000


def table(view: ModelView) -> Tensor:
    """The token embeddings, (entries, hidden)."""
    weight = None if view.input_embedding is None else view.input_embedding._parameters.get("weight")
    if weight is None:
        raise UnsupportedError(
            f"{type(view.model).__name__} has no token embeddings, so it has no place for a soft prompt"
        )
    return weight


def empty(view: ModelView, *shape: int) -> Tensor:
    """Uninitialised storage where the embeddings are, in full precision."""
    like = table(view)
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    return torch.empty(*shape, dtype=dtype, device=like.device)


def embedded(view: ModelView, ids: Sequence[int]) -> Tensor:
    """The base's embeddings of some tokens, (tokens, hidden), whatever adapter is active.

    They go through the layer, not directly to its table, because some models scale what they look up.
    """
    embedding: Any = view.input_embedding
    with bare(view.model):
        found: Tensor = embedding(torch.tensor(list(ids), device=table(view).device))
    return found


def common_words(view: ModelView, count: int) -> list[int]:
    """Tokens drawn from the 5,000 most common: a subword vocabulary is ordered by frequency, after special tokens."""
    special = {i for n in ("bos", "eos", "pad") if isinstance(i := getattr(view.config, f"{n}_token_id", None), int)}
    common = [i for i in range(min(COMMON + len(special), table(view).shape[0])) if i not in special]
    return [common[i] for i in torch.randint(len(common), (count,)).tolist()]


def words(view: ModelView, text: str) -> list[int]:
    """The tokens of a text, by the model's own tokenizer."""
    ids: list[int] = _tokenizer(view)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"the text {text!r} contains no token")
    return ids


def repeated(ids: Sequence[int], length: int) -> list[int]:
    """The tokens, repeated from the start if there are too few."""
    return [ids[i % len(ids)] for i in range(length)]


def _tokenizer(view: ModelView) -> Any:
    from transformers import AutoTokenizer

    path = getattr(view.config, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"init from words needs the model's tokenizer, but none was found at {path!r}: load the model from a "
            "folder that has its tokenizer, or choose another init"
        ) from error
