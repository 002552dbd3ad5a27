"""Files that ship with the package: the embedded base model, in `base/` with its card."""

from __future__ import annotations

from pathlib import Path


def base_path() -> Path:
    """The folder of the embedded base: a transformers model with its tokenizer."""
    return Path(__file__).parent / "base"
