"""Optimizers by the names of `--optimizer`, and what each of them needs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from inlay.core.errors import ConfigError

# Our name → the name in `transformers.TrainingArguments.optim`; None is its default, torch's AdamW.
NAMES: dict[str, str | None] = {
    "adamw": None,
    "adamw8bit": "adamw_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "lion8bit": "lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
OWN = ("adamw", "adafactor", "sgd")  # these need no further package


def check_optimizer(name: str) -> None:
    """Raise a `ConfigError` if the optimizer cannot run here."""
    import torch

    if name not in OWN and find_spec("bitsandbytes") is None:
        raise ConfigError(f"optimizer {name!r} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if name.startswith("paged") and not torch.cuda.is_available():
        without = name.removeprefix("paged-")
        raise ConfigError(f"optimizer {name!r} moves its states between GPU and main memory; on a CPU give {without!r}")


def optimizer_options(name: str, *, scaled: bool = False) -> dict[str, Any]:
    """The arguments of `TrainingArguments` for an optimizer.

    Args:
        scaled: whether gradients are scaled, so that a step that overflows must be skipped. A fused optimizer would be
            called for it all the same, and the learning-rate schedule would advance.
    """
    chosen = "adamw_torch" if scaled and NAMES[name] is None else NAMES[name]
    return {} if chosen is None else {"optim": chosen}
