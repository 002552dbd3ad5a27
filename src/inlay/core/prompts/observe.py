"""The keys and values of a text in the bare model, at every attention module, as they enter its softmax."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.contracts.prompt import KeyValues
from inlay.core.forward.active_adapters import bare
from inlay.core.model.view import AttentionPlace, ModelView
from inlay.core.prompts.attention_function import attend, implementation
from inlay.core.prompts.interface import NAMESPACE, put_back, registered, swapped
from inlay.core.prompts.prefix_attention import Attended

_SEEN: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("seen", default=None)


def keys_values(view: ModelView, places: Sequence[AttentionPlace], **inputs: Tensor) -> KeyValues:
    """Run the base alone over one row and collect keys and values.

    Args:
        places: the attention modules to observe; each must be reached.

    Returns:
        Path → keys and values, (key heads, tokens, head size), positions applied, not repeated for grouped heads.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    token = _SEEN.set(seen)
    changed = swapped(view, places, _observing)
    try:
        with bare(view.model), torch.no_grad():
            view.model(**inputs, use_cache=False)
    finally:
        _SEEN.reset(token)
        put_back(changed)
    return {p.path: tuple(t[0] for t in seen[id(p.module)]) for p in places}


def _observing(original: str) -> str:
    """The registered name of an attention that computes what `original` does and records keys and values."""
    original = implementation(original).removeprefix(NAMESPACE)
    return registered("observed_", original, partial(_observed, original))


def _observed(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Attended:
    seen = _SEEN.get()
    if seen is not None:
        seen[id(module)] = (key, value)
    return attend(original, module, query, key, value, mask, **kwargs)
