"""Which laws `make test` holds for which method on which model, and what it leaves to `-m exhaustive`.

    laws about results   every method on every one of `ARCHITECTURES`: what a method computes meets what a model is
                         made of, and any pair may be the one that fails.
    laws about running   generation, checkpointing, copies and the like pass through the core. They meet a method in
                         the pieces it is made of and a model in its modules, so pairs cover them: every method on a
                         model of each kind (`KINDS`), and on every architecture one method of each `make`.

With `-m exhaustive` every law is held for every method on every model of the zoo.
"""

from __future__ import annotations

from functools import cache

import inlay
from inlay.core.contracts.delta import Delta
from inlay.core.contracts.method import Method
from inlay.core.contracts.pieces import DeltaPiece, PromptPiece
from inlay.core.contracts.prompt import KeyValuePrompt
from inlay.methods import registry
from inlay.testing import ZOO, Specimen
from inlay.testing.laws.scaffold import put

ARCHITECTURES = (
    "llama", "gemma2", "phi3", "gpt2", "opt", "mixtral", "bloom", "bert", "deberta-v2", "t5", "bart", "vit",
    "sequential",
)  # fmt: skip
KINDS = ("llama", "bert", "t5", "vit", "sequential")
ABOUT_RUNNING = frozenset(
    {"generation", "mixed_training", "checkpointing", "precision", "copying", "all_or_nothing", "resuming"}
)

Make = frozenset[tuple[object, ...]]


def left_out(method: Method, specimen: Specimen) -> frozenset[str]:
    """The laws that `make test` does not hold for a pair, because others cover them."""
    covered = specimen.name not in KINDS and type(method) not in one_of_each_make().values()
    return ABOUT_RUNNING if covered and specimen.name in ARCHITECTURES else frozenset()


def one_of_each_make() -> dict[Make, type[Method]]:
    """The methods that stand for all that are made of the same sorts of pieces: the first of each."""
    found: dict[Make, type[Method]] = {}
    for method in registry().values():
        found.setdefault(make(method), method)
    return found


@cache
def make(method: type[Method]) -> Make:
    """What the core sees of a method: the sorts of its pieces, at which sites, with which views."""
    for name in KINDS:
        try:
            return frozenset(map(_sort, put(ZOO[name], ZOO[name].build(), method.examples()[0]).pieces))
        except inlay.UserError:  # it wants biases, say, and there are none
            continue
    raise AssertionError(f"{method.name} can be attached to no kind of model")


def _sort(piece: object) -> tuple[object, ...]:
    if isinstance(piece, DeltaPiece):
        kind = type(piece.delta)
        views = tuple(v for v in ("pre", "post", "weight") if getattr(kind, v) is not getattr(Delta, v))
        return (piece.site.kind, views, kind.reads_span, bool(piece.site.sources), bool(piece.branches))
    if isinstance(piece, PromptPiece):
        return ("keys and values" if isinstance(piece.prompt, KeyValuePrompt) else "tokens",)
    return ("difference",)
