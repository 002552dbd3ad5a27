"""Which settings of one method fit into a given amount of memory, and the first that do not.

Memory grows with batch and length. So for each quantisation, with and without checkpointing, and for each length, there
is a largest batch that fits and a next one that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from inlay.plan.planner import Plan, Planner
from inlay.plan.setting import Quantisation, Setting

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One choice of quantisation and checkpointing at one length.

    Attributes:
        fits: the plan with the largest batch that fits; None if not even one row does.
        beyond: the plan with the smallest batch that does not fit; None if the largest one tried fits.
    """

    fits: Plan | None
    beyond: Plan | None


def search(
    planner: Planner,
    memory: float,
    *,
    start: Setting,
    quantisations: Sequence[Quantisation | None],
    lengths: Sequence[int],
    batches: Sequence[int] = BATCHES,
    checkpointing: Sequence[bool] = (False, True),
) -> list[Fit]:
    """Every choice at every length, best first: the least quantised weights, the longest rows, the fastest.

    Args:
        memory: bytes for weights, adapter and step, without what the process itself takes.
        start: the values of everything that is not searched.
        quantisations: from the most to the least exact.
    """
    found = [
        _largest(planner, memory, setting, batches) for setting in _ways(start, quantisations, lengths, checkpointing)
    ]
    order = {quantisation: place for place, quantisation in enumerate(quantisations)}

    def rank(fit: Fit) -> tuple[float, ...]:
        plan = fit.fits or fit.beyond
        assert plan is not None, "a batch either fits or does not"
        setting, speed = plan.setting, plan.tokens_per_second or 0.0
        return (fit.fits is None, order[setting.quantisation], -setting.length, -speed, setting.checkpointing)

    return sorted(found, key=rank)


def _ways(
    start: Setting, quantisations: Sequence[Quantisation | None], lengths: Sequence[int], checkpointing: Sequence[bool]
) -> Iterator[Setting]:
    for quantisation in quantisations:
        for length in lengths:
            for checkpointed in checkpointing:
                yield replace(start, quantisation=quantisation, length=length, checkpointing=checkpointed)


def _largest(planner: Planner, memory: float, setting: Setting, batches: Sequence[int]) -> Fit:
    fits: Plan | None = None
    for batch in sorted(batches):
        plan = planner.plan(replace(setting, batch=batch), by_batch=True)
        if plan.memory.total > memory:
            return Fit(fits=fits, beyond=plan)
        fits = plan
    return Fit(fits=fits, beyond=None)
