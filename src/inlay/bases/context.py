"""How many tokens a base can read."""

from __future__ import annotations

from typing import Any

from torch import nn


def stated_context(model: Any) -> int | None:
    """The limit in the model's configuration or of its learned position table; None if there is none."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from the padding index on.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            stated = module.num_embeddings - module.padding_idx - 1
    return stated if isinstance(stated, int) and stated > 0 else None
