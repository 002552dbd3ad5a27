"""Shared by all families in PEFT's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inlay.core.model.select import Places
from inlay.core.model.view import ModelView
from inlay.formats.peft import targets

PREFIX = "base_model.model."  # prefix of every name in the file if PEFT has replaced layers
PROMPT_PREFIX = "base_model."  # prefix if PEFT has put a prompt in front of the model


def header(view: ModelView, peft_type: str, saved: Sequence[str]) -> dict[str, Any]:
    """The keys that every configuration has."""
    return {
        "peft_type": peft_type,
        "task_type": targets.task_type(view, saved),
        "base_model_name_or_path": str(getattr(view.config, "name_or_path", "") or "") or None,
        "inference_mode": True,
        "modules_to_save": list(saved) or None,
    }


def places_of(paths: Sequence[str]) -> Places:
    """The places that are exactly these modules."""
    return Places.of(list(paths), None)
