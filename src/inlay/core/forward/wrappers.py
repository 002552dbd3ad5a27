"""What may stand around a module's forward: one ordered list, and the one switch of the fast paths.

    caller ─▶ … ─▶ forward ─▶ norm ─▶ … ─▶ root ─▶ … ─▶ rotary ─▶ the module's own        `ORDER` from right to left

Who computes a wrapper registers it under a name of `ORDER` (`core/prompts/prompting.py`, `inlay.kernels`); where it
stands is said here and nowhere else. ``forward`` is the adapters themselves (`core/forward/host.py`): what is named
behind it sees a module's input before any adapter does. A wrapper that only saves time or memory is a *fast path*: its
name is in `FAST_PATHS`, beside those that are no wrappers, and while a name is switched off the code is in force that
the fast path stands for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from inlay.core.errors import ConfigError, nearest, problems
from inlay.core.model.view import ModelView

Wrapper = Callable[..., Any]
"""``wrap(host, inner, *args, **kwargs)``; `inner` is what it stands around."""

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
    "grouped-rows": "the adapters of a mixed batch as one stacked product a layer",
    "prefix-attention": "prefixes as a second attention, merged by log-sum-exp",
    "kept-prompts": "prompts computed once and kept while nothing changes",
    "loss-at-labels": "scores over the vocabulary at labelled positions only",
    "attention-backward": "a faster backward pass for attention in half precision on the CPU, and its dropout",
    "dropout": "masks of dropout drawn by a seed instead of kept",
    "gated-mlp": "gated feed-forwards that keep less for the backward pass",
    "read-positions": "layers computed at the positions that a pooled output reads: no padding, the last block's first",
    "norm": "root-mean-square norms that keep less for the backward pass",
    "packing": "texts behind one another in place of padding, in training runs",
    "trunk-cache": "states below the lowest trained layer computed once, in training runs",
}

VARIABLE = "INLAY_FAST_PATHS"
_WRAPPERS: dict[str, Wrapper] = {}
_AROUND_ROOT: dict[str, Wrapper] = {}
_RECOGNISES: dict[str, Callable[[nn.Module, ModelView], bool]] = {}


def register(name: str, wrap: Wrapper, recognises: Callable[[nn.Module, ModelView], bool] | None = None) -> None:
    """Say what stands around a module that has the feature `name`.

    Args:
        recognises: which modules of an attached model get the feature by themselves.
    """
    _check(name, ORDER)
    _WRAPPERS[name] = wrap
    if recognises is not None:
        _RECOGNISES[name] = recognises


def register_around_root(name: str, wrap: Wrapper) -> None:
    """Say what stands around the model's own forward, behind prompts and routing."""
    _check(name, AROUND_ROOT)
    _AROUND_ROOT[name] = wrap


def among(features: Iterable[str]) -> tuple[tuple[str, Wrapper], ...]:
    """The wrappers of these features with their names, innermost first."""
    return tuple((name, _WRAPPERS[name]) for name in ORDER if name in features and name in _WRAPPERS)


def around_root() -> list[Wrapper]:
    """What stands around the model's own forward now, innermost first."""
    return [_AROUND_ROOT[name] for name in AROUND_ROOT if name in _AROUND_ROOT and name not in OFF]


def recognised(module: nn.Module, view: ModelView) -> list[str]:
    """The features that a module of an attached model gets by itself."""
    return [name for name in ORDER if name in _RECOGNISES and _RECOGNISES[name](module, view)]


def enabled(name: str) -> bool:
    """Whether the fast path `name` is on."""
    return name not in OFF


def switched(on: bool, names: Iterable[str] = ()) -> frozenset[str]:
    """The names that are off once these (all, where none is given) are switched on or off.

    Raises:
        ConfigError: a name is unknown.
    """
    wanted = checked(names) or set(FAST_PATHS)
    return frozenset(OFF - wanted if on else OFF | wanted)


def checked(names: Iterable[str]) -> set[str]:
    """These names, once all are known to be fast paths'.

    Raises:
        ConfigError: some are not.
    """
    wanted = set(names)
    wrong = [f"unknown fast path {name!r}{nearest(name, FAST_PATHS)}" for name in sorted(wanted - FAST_PATHS.keys())]
    if wrong:
        raise ConfigError(problems(f"fast paths (there are {', '.join(FAST_PATHS)})", wrong))
    return wanted


def _from_environment(value: str) -> set[str]:
    """Which are off: ``0`` all, ``1`` or nothing none, ``-norm,-dropout`` these, ``norm,dropout`` all but these."""
    words = [word.strip() for word in value.split(",") if word.strip()]
    if words in ([], ["1"]):
        return set()
    if words == ["0"]:
        return set(FAST_PATHS)
    left_out = [word.removeprefix("-") for word in words if word.startswith("-")]
    unknown = sorted({word.removeprefix("-") for word in words} - FAST_PATHS.keys())
    if unknown or (left_out and len(left_out) < len(words)):
        raise ConfigError(
            f"{VARIABLE} is {value!r}, expected 0, 1, names to leave on (norm,dropout), or names to leave out, each "
            f"with a minus (-norm,-dropout); there are {', '.join(FAST_PATHS)}"
        )
    return set(left_out) if left_out else set(FAST_PATHS) - set(words)


def _check(name: str, order: tuple[str, ...]) -> None:
    if name not in order:
        raise ValueError(f"{name!r} has no place yet: name it in core/forward/wrappers.py, in {order}")


# Which fast paths are off, in the whole process. Read at every call, so a change counts for models attached before.
OFF: set[str] = _from_environment(os.environ.get(VARIABLE, ""))
