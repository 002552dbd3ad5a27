"""What the bare model's attention sees of a text: the keys and values of every module, as they enter its softmax."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from inlay.core.attention import PREFIX, attend, implementation
from inlay.core.measure import bare
from inlay.core.prefixed import Attended
from inlay.core.prompt import KeyValues
from inlay.core.view import AttentionPlace, ModelView

_SEEN: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("seen", default=None)


def keys_values(view: ModelView, places: Sequence[AttentionPlace], **inputs: Tensor) -> KeyValues:
    """Run the base alone over one row.

    Args:
        places: whose keys and values are wanted; each must be reached.

    Returns:
        Path → keys and values, (key heads, tokens, head size), positions applied, not repeated for grouped heads.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    configs = list({id(c): c for p in places if (c := getattr(p.module, "config", view.config)) is not None}.values())
    before = [config._attn_implementation for config in configs]
    token = _SEEN.set(seen)
    try:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = _observing(implementation(name or "eager").removeprefix(PREFIX))
        with bare(view.model), torch.no_grad():
            view.model(**inputs, use_cache=False)
    finally:
        _SEEN.reset(token)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
    return {p.path: tuple(t[0] for t in seen[id(p.module)]) for p in places}


def _observing(original: str) -> str:
    """The registered name of an attention that does what `original` does and leaves keys and values behind."""
    name = f"observed_{original}"
    if name not in AttentionInterface._global_mapping:

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
        ) -> Attended:
            seen = _SEEN.get()
            if seen is not None:
                seen[id(module)] = (key, value)
            return attend(original, module, query, key, value, mask, **kwargs)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, AttentionMaskInterface._global_mapping[original])
    return name
