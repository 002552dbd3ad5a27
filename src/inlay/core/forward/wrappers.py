"""The wrappers that may stand around a module's forward, in one ordered list, and the switch of the fast paths.

    caller ─▶ … ─▶ forward ─▶ norm ─▶ … ─▶ root ─▶ … ─▶ rotary ─▶ the module's own        `ORDER` from right to left

The file that implements a wrapper registers it under a name of `ORDER` (`core/prompts/virtual_positions.py`,
`inlay.kernels`); the order is decided here and nowhere else. ``forward`` is the adapters themselves
(`core/forward/host.py`): the names behind it see a module's input before any adapter does. A wrapper that only saves
time or memory is a *fast path*. Its name is in `FAST_PATHS`, together with those that are no wrappers; while it is
switched off, the plain code runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from inlay.core.errors import ConfigError, UnsupportedError, nearest, problems
from inlay.core.model.view import ModelView

Wrapper = Callable[..., Any]
"""``wrap(host, inner, *args, **kwargs)``; `inner` is the forward that it wraps."""

# Innermost first: a module may be root and stack at once.
ORDER = (
    *("rotary", "weighing", "pooler", "stack", "source", "root"),
    *("dropout", "attention-backward", "gated-mlp", "loss-at-labels", "norm", "trunk-cache"),
    *("forward", "read-positions"),
)
AROUND_ADAPTERS = frozenset(ORDER[ORDER.index("forward") :])  # they change nothing of what the module itself computes
# Inside `root`, around the model's own forward; innermost first.
AROUND_ROOT = ("packing", "loss-at-labels", "read-positions")

FAST_PATHS = {
    "fused-update": "a linear layer and its low-rank update in one pass, forward and backward",
    "grouped-rows": "the adapters of a mixed batch as one stacked product per layer",
    "prefix-attention": "prefixes as a second attention, combined by log-sum-exp",
    "kept-prompts": "prompts computed once and cached while nothing changes",
    "loss-at-labels": "logits and loss at labelled positions only",
    "attention-backward": "a faster backward pass of half-precision attention on the CPU, and its dropout",
    "dropout": "dropout masks drawn again from a seed instead of stored",
    "gated-mlp": "gated feed-forwards that store less for the backward pass",
    "read-positions": "layers computed only where a pooled output reads: no padding, the last block's first position",
    "norm": "RMS norms that store less for the backward pass",
    "packing": "several texts in one row instead of padding, in training runs",
    "trunk-cache": "hidden states below the lowest trained layer computed once, in training runs",
}

VARIABLE = "INLAY_FAST_PATHS"
_WRAPPERS: dict[str, Wrapper] = {}
_AROUND_ROOT: dict[str, Wrapper] = {}
_RECOGNISES: dict[str, Callable[[nn.Module, ModelView], bool]] = {}


def register(name: str, wrap: Wrapper, recognises: Callable[[nn.Module, ModelView], bool] | None = None) -> None:
    """Register the wrapper around modules that have the feature `name`.

    Args:
        recognises: tells which modules of an attached model get the feature automatically.
    """
    _check(name, ORDER)
    _WRAPPERS[name] = wrap
    if recognises is not None:
        _RECOGNISES[name] = recognises


def register_around_root(name: str, wrap: Wrapper) -> None:
    """Register a wrapper around the model's own forward, inside of prompts and routing."""
    _check(name, AROUND_ROOT)
    _AROUND_ROOT[name] = wrap


def among(features: Iterable[str]) -> tuple[tuple[str, Wrapper], ...]:
    """The wrappers of these features with their names, innermost first."""
    return tuple((name, _WRAPPERS[name]) for name in ORDER if name in features and name in _WRAPPERS)


def around_root() -> list[Wrapper]:
    """The wrappers around the model's own forward that are on, innermost first."""
    return [_AROUND_ROOT[name] for name in AROUND_ROOT if name in _AROUND_ROOT and name not in OFF]


def recognised(module: nn.Module, view: ModelView) -> list[str]:
    """The features that a module of an attached model gets automatically."""
    return [name for name in ORDER if name in _RECOGNISES and _RECOGNISES[name](module, view)]


def enabled(name: str) -> bool:
    """Whether the fast path `name` is on."""
    return name not in OFF


def switched_off(name: str, *, asked: bool) -> bool:
    """What a run does about a fast path that is off: nothing (False), or it refuses because it was asked for.

    Raises:
        UnsupportedError: it was asked for by name.
    """
    if asked:
        raise UnsupportedError(f"{name} is asked for, but switched off ({VARIABLE} or inlay.fast_paths); drop one")
    return False


def switched(on: bool, names: Iterable[str] = ()) -> frozenset[str]:
    """The names that are off after switching these (all if none is given) on or off.

    Raises:
        ConfigError: a name is unknown.
    """
    wanted = checked(names) or set(FAST_PATHS)
    return frozenset(OFF - wanted if on else OFF | wanted)


def checked(names: Iterable[str]) -> set[str]:
    """These names as a set.

    Raises:
        ConfigError: some are not names of fast paths.
    """
    wanted = set(names)
    wrong = [f"unknown fast path {name!r}{nearest(name, FAST_PATHS)}" for name in sorted(wanted - FAST_PATHS.keys())]
    if wrong:
        raise ConfigError(problems(f"fast paths (there are {', '.join(FAST_PATHS)})", wrong))
    return wanted


def _from_environment(value: str) -> set[str]:
    """The names that are off: ``0`` all, ``1`` or empty none, ``-norm,-dropout`` these, ``norm,dropout`` all others."""
    words = [word.strip() for word in value.split(",") if word.strip()]
    if words in ([], ["1"]):
        return set()
    if words == ["0"]:
        return set(FAST_PATHS)
    left_out = [word.removeprefix("-") for word in words if word.startswith("-")]
    unknown = sorted({word.removeprefix("-") for word in words} - FAST_PATHS.keys())
    if unknown or (left_out and len(left_out) < len(words)):
        raise ConfigError(
            f"{VARIABLE} is {value!r}, expected 0, 1, names to leave on (norm,dropout), or names to switch off, "
            f"each with a minus (-norm,-dropout); known: {', '.join(FAST_PATHS)}"
        )
    return set(left_out) if left_out else set(FAST_PATHS) - set(words)


def _check(name: str, order: tuple[str, ...]) -> None:
    if name not in order:
        raise ValueError(f"{name!r} has no place yet: add it to {order} in core/forward/wrappers.py")


# The fast paths that are off, in the whole process. Read at every call, so that a change affects attached models too.
OFF: set[str] = _from_environment(os.environ.get(VARIABLE, ""))
