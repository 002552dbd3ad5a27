"""What one forward of the model carries along besides its inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from inlay.core.contracts.prompt import KeyValues
from inlay.core.forward.batched_adapters import Stacks
from inlay.core.forward.route import Route


@dataclass(frozen=True)
class Call:
    """The route of a forward, and the prompts of its adapters, computed once.

    Attributes:
        prefixes: adapter → attention path → (keys, values) in front of the text there.
        gated: adapter → attention path → (keys, values, gates) beside the text there.
        shifts: adapter → number of positions by which its text shifts in a decoder.
        sequences: adapter → virtual tokens (length, hidden) that are part of an encoder's sequence.
        prefilled: the adapters whose prefix comes from tokens that were run through the model, so that a sliding
            window applies to it.
        rows, tokens: sizes of the batch; known once the model is called.
        padding: for each row, the number of masked tokens in front of its text, if the caller gave no positions.
        order: order of an encoder's sequence, (rows, block + tokens); None if the block stands before the text.
        prompt: number of tokens that generation started from, while it is under way.
        span: first token of each row's prompt in this forward, and the one after its last, (rows, 2); only if some
            delta reads it.
        stacks: the stacked adapters with which mixed rows are computed at once, where no gradients flow.
        capture: where attention modules put their own keys and values while a prompt is prefilled.
    """

    route: Route
    prefixes: dict[str, KeyValues] = field(default_factory=dict)
    gated: dict[str, KeyValues] = field(default_factory=dict)
    shifts: dict[str, int] = field(default_factory=dict)
    sequences: dict[str, Tensor] = field(default_factory=dict)
    prefilled: frozenset[str] = frozenset()
    rows: int | None = None
    tokens: int | None = None
    padding: Tensor | None = None
    order: Tensor | None = None
    prompt: int | None = None
    span: Tensor | None = None
    stacks: Stacks | None = None
    capture: KeyValues | None = None

    @property
    def block(self) -> int:
        """Length of the virtual block in an encoder's sequence: the longest of the batch."""
        return max([0, *(s.shape[0] for s in self.sequences.values())])

    def tensors(self, below: str) -> list[Tensor]:
        """The prompts' tensors for the attention modules below a path, in a fixed order."""
        owners = (self.prefixes, self.gated)
        return [t for o in owners for kv in o.values() for p, held in kv.items() if is_below(p, below) for t in held]

    def with_tensors(self, below: str, tensors: list[Tensor]) -> Call:
        """A copy of this call with the tensors that `tensors(below)` lists replaced."""
        given = iter(tensors)

        def replaced(owner: dict[str, KeyValues]) -> dict[str, KeyValues]:
            return {
                name: {p: tuple(next(given) for _ in held) if is_below(p, below) else held for p, held in kv.items()}
                for name, kv in owner.items()
            }

        return replace(self, prefixes=replaced(self.prefixes), gated=replaced(self.gated))


def is_below(path: str, ancestor: str) -> bool:
    """Whether the module at `path` is the one at `ancestor` or inside it."""
    return ancestor == "" or path == ancestor or path.startswith(ancestor + ".")


def cache_among(given: Iterable[Any]) -> Any | None:
    """The cache of earlier keys and values among a forward's arguments.

    Found by what it can do: architectures pass it by position and under several names, and transformers has renamed
    it (`past_key_values` until 5.23, `cache` from 5.24).
    """
    return next((value for value in given if hasattr(value, "get_seq_length")), None)
