"""Hugging Face PEFT's files: `adapter_config.json` and `adapter_model.safetensors`, as PEFT 0.21 writes them.

    FAMILIES   peft_type → how it is read
    WRITERS    our method → how it is written

PEFT stores no digest and no fingerprint of the base, so only names and shapes can be compared with the model. What PEFT
ignores silently (targets that match nothing, missing and unexpected tensors, unknown keys that may change the result)
is one error here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from inlay.core.contracts.adapter import Adapter
from inlay.core.errors import AdapterFileError, ConfigError, UnsupportedError, UserError, nearest, problems
from inlay.core.model.view import ModelView
from inlay.formats.archive import Archive, open_archive
from inlay.formats.configuration import FILE, WEIGHTS, Config, read_config
from inlay.formats.exchange import CRASHES, Reading, Writing, restore, store
from inlay.formats.peft import adaption, deltas, low_rank, prompts, rescaling, settings, tokens

__all__ = ["FAMILIES", "FILE", "LEFT_OUT", "WRITERS", "read", "write"]

FAMILIES: Mapping[str, Callable[[Config, ModelView, Archive], Reading]] = {
    "LORA": low_rank.read,
    "IA3": rescaling.read,
    "PROMPT_TUNING": prompts.read_prompt,
    "PREFIX_TUNING": prompts.read_prefix,
    "P_TUNING": prompts.read_prompt,
    "MULTITASK_PROMPT_TUNING": prompts.read_multitask,
    "ADAPTION_PROMPT": adaption.read,
    "TRAINABLE_TOKENS": tokens.read,
    **dict.fromkeys(settings.METHODS, deltas.read),
}
WRITERS: Mapping[str, Callable[[Adapter, ModelView], Writing]] = {
    "lora": low_rank.write,
    "dora": low_rank.write,
    "lora-plus": low_rank.write,
    "eva": low_rank.write,
    "lora-fa": low_rank.write,
    "dylora": low_rank.write,
    "pissa": low_rank.write,
    "olora": low_rank.write,
    "ia3": rescaling.write,
    "prompt-tuning": prompts.write_prompt,
    "p-tuning": prompts.write_prompt,
    "multitask-prompt": prompts.write_multitask,
    "prefix-tuning": prompts.write_prefix,
    "llama-adapter": adaption.write,
    "trainable-tokens": tokens.write,
    **dict.fromkeys(settings.TYPES, deltas.write),
}

# Our method → what PEFT's files cannot hold of it; what it computes is always kept.
LEFT_OUT: Mapping[str, str] = {
    "adalora": "the averages and the step counter of an unfinished schedule",
    "dylora": "that it can be used at lower ranks",
    "eva": "how it was initialised",
    "lora-fa": "that A is frozen",
    "lora-plus": "the ratio of the learning rates",
    "olora": "that it started as a part of the weight: it becomes a LoRA of twice the rank",
    "p-tuning": "the prompt encoder; its final embeddings are written",
    "pissa": "that it started as a part of the weight: it becomes a LoRA of twice the rank",
    "prefix-tuning": "the projection; its final keys and values are written",
}


def read(
    model: nn.Module, folder: Path, *, name: str | None, trainable: bool, allow_pickle: bool, task: int | None
) -> Adapter:
    """Attach an adapter from PEFT's files, strictly."""
    values = read_config(folder)
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise AdapterFileError(
            f"{folder / FILE}: peft_type {kind!r} has no counterpart in inlay{nearest(str(kind), FAMILIES)}"
        )
    archive = open_archive(folder, *WEIGHTS, allow_pickle=allow_pickle)
    if task is not None and kind != "MULTITASK_PROMPT_TUNING":
        raise ConfigError(f"task is only for files with several tasks, and this is a {kind}; leave it out")
    config = Config(values, folder / FILE, task)
    try:
        reading = FAMILIES[kind](config, ModelView(model), archive)
    except (UserError, *CRASHES) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(
            problems(f"{config.path} cannot be used on this model", [*config.wrong, f"{type(error).__name__}: {error}"])
        ) from error
    config.finish()
    return restore(model, reading, archive, name=name or "default", trainable=trainable, wrong=config.wrong)


def write(model: nn.Module, adapter: Adapter, folder: Path) -> Path:
    """Write an adapter for PEFT.

    Raises:
        UnsupportedError: the method, or this use of it, has no counterpart in PEFT's format.
    """
    if adapter.method.name not in WRITERS:
        raise UnsupportedError(
            f"method {adapter.method.name!r} has no counterpart in PEFT's format; these have: {', '.join(WRITERS)}"
        )
    return store(folder, WRITERS[adapter.method.name](adapter, ModelView(model)), WEIGHTS[0], FILE)
