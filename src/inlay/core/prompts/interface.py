"""transformers' attention interface: how a function of ours is put in front of a model's own attention.

A name is registered for attention and for masks. Without the second, the mask would arrive as None, and padded rows
would be silently wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from inlay.core.model.view import AttentionPlace, ModelView
from inlay.core.upstream import attention_named, name_attention

Attention: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
Named: TypeAlias = list[tuple[Any, str | None]]
"""Configurations, each with the attention implementation that it named before."""

NAMESPACE = "inlay_"
ATTENTION, MASKS = AttentionInterface(), AttentionMaskInterface()  # views of what is registered for all models


def original_attention(name: str, module: nn.Module) -> Attention:
    """The attention function that the implementation `name` (``sdpa``, ``eager``, …) stands for in a module."""
    if name == "eager":
        own: Attention = sys.modules[type(module).__module__].eager_attention_forward
        return own
    shared: Attention = ATTENTION[name]
    return shared


def registered(prefix: str, original: str, attention: Attention, masks: Callable[..., Any] | None = None) -> str:
    """The name of `attention` in front of `original`; registered with transformers the first time.

    Args:
        masks: makes the masks for it; None makes them as `original` does.
    """
    name = prefix + original
    if name not in ATTENTION:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, masks or MASKS[original])
    return name


def configurations(view: ModelView, places: Iterable[AttentionPlace]) -> list[Any]:
    """The configurations in which these attention modules look up their implementation, each once."""
    found = {id(c): c for p in places if (c := getattr(p.module, "config", view.config)) is not None}
    return list(found.values())


def swapped(view: ModelView, places: Iterable[AttentionPlace], name: Callable[[str], str]) -> Named:
    """Let configurations name another implementation; the result is for `put_back`.

    Args:
        name: makes the new name from the old one.
    """
    changed: Named = []
    new = [(c, o, name(o)) for c in configurations(view, places) for o in (attention_named(c) or "eager",)]
    for config, original, wanted in new:
        if wanted != original:
            changed.append((config, attention_named(config)))
            name_attention(config, wanted)
    return changed


def put_back(changed: Named, keep: int = 0) -> None:
    """Let configurations name their former implementation again, all but the first `keep`."""
    while len(changed) > keep:
        config, original = changed.pop()
        name_attention(config, original)
