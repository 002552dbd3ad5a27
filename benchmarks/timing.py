"""Timing several ways of doing the same thing, alternately, so that whatever disturbs one disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MINIMUM_RUNS = 7
_clock = time.perf_counter


def count_processor_time() -> None:
    """Time what this process computes instead of what passes: for a look at ratios on a busy machine."""
    global _clock
    _clock = time.process_time


def counts_processor_time() -> bool:
    """Whether it does."""
    return _clock is time.process_time


def now() -> float:
    """Seconds on the clock that is in use."""
    return _clock()


@dataclass(frozen=True)
class Timing:
    """The seconds of each run of one contender, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Milliseconds: median, quartiles and every run."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else (self.median,) * 3
        return {
            "median_ms": _ms(self.median),
            "quartiles_ms": [_ms(low), _ms(high)],
            "runs_ms": [_ms(s) for s in self.seconds],
        }


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    *,
    runs: int,
    warmup: int = 2,
    repeat: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Run every contender once a round, in an order that is reversed from round to round.

    Args:
        contenders: name → what is timed.
        runs: rounds that count.
        warmup: rounds before them that do not.
        repeat: calls a run of what is too short for the clock; the time is one call's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.freeze()  # else each collection below would look through the libraries again, for a quarter of a second
    try:
        for turn in range(warmup + runs):
            names = list(contenders) if turn % 2 == 0 else list(reversed(contenders))
            for name in names:
                spent = _timed(contenders[name], (repeat or {}).get(name, 1))
                if turn >= warmup:
                    seconds[name].append(spent)
    finally:
        gc.unfreeze()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _timed(call: Callable[[], object], calls: int) -> float:
    """Seconds a call, nobody's garbage among them but its own."""
    gc.collect()
    began = now()
    for _ in range(calls):
        call()
    return (now() - began) / calls


def ratio(one: Timing, other: Timing) -> dict[str, float]:
    """How many times as long `one` takes: of the medians, and the extremes of the single rounds."""
    rounds = [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]
    return {
        "of_medians": round(one.median / other.median, 4),
        "lowest_round": round(min(rounds), 4),
        "highest_round": round(max(rounds), 4),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 4)
