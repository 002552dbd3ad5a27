"""The laws: what must hold for every method on every model; each one is a function that raises if it does not.

A law takes a `Specimen` and a `Method` instance. Adapters get random values first ("trained"), because a new one
changes nothing and would obey most laws by doing nothing. For the same reason the law `silence` checks that an adapter
has an effect.
"""

from __future__ import annotations

from collections.abc import Callable

from inlay.core.contracts.method import Method
from inlay.testing.laws.computing import (
    checkpointing,
    compiling,
    generation,
    mixed_training,
    only_the_adapter_learns,
    precision,
    resuming,
    rows_are_independent,
    views_agree,
)
from inlay.testing.laws.lifecycle import (
    all_or_nothing,
    configuration,
    copying,
    detach_restores,
    identity,
    silence,
    storage,
)
from inlay.testing.laws.scaffold import refusal, train
from inlay.testing.specimen import Specimen

__all__ = ["LAWS", "SLOW_LAWS", "Law", "refusal", "train"]

Law = Callable[[Specimen, Method], None]

LAWS: dict[str, Law] = {
    f.__name__: f
    for f in (
        identity, silence, views_agree, storage, only_the_adapter_learns, rows_are_independent, mixed_training,
        generation, detach_restores, all_or_nothing, checkpointing, precision, copying, configuration,
        resuming,
    )
}  # fmt: skip
SLOW_LAWS: dict[str, Law] = {"compiling": compiling}
