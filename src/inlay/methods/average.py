"""Average: a weighted sum of what methods contribute, as one adapter.

Output averaging as in Poth et al. 2023, arXiv:2311.11077, section 4; unlike averaging matrices it is exact for
adapters of different ranks, sizes and kinds.

    y + Σᵢ wᵢ (postᵢ(x, y) − y)          W + Σᵢ wᵢ (Wᵢ − W)          x + Σᵢ wᵢ (preᵢ(x) − x)

The weights are given and not trained; they need not sum to one, and negative ones take a contribution away.
A prompt cannot take part: half of a virtual token is not half of its effect, because attention normalises. It
merges where all its methods do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from inlay.authoring import Branch, Method, ModelView, Piece, Places, PromptPiece, UnsupportedError
from inlay.methods._composition import Composition, restored


@dataclass(frozen=True, init=False)
class Average(Composition):
    """``Average({LoRA(rank=4): 0.5, LoRA(rank=8): 0.5})``; pairs where two methods are equal.

    Attributes:
        methods: the members.
        weights: one for each member.
    """

    name: ClassVar[str] = "average"
    paper: ClassVar[str] = "arXiv:2311.11077"
    table_order: ClassVar[int] = 30

    methods: tuple[Method, ...]
    weights: tuple[float, ...]

    def __init__(self, members: Mapping[Any, float] | Iterable[tuple[Method, float]] = ()) -> None:
        from inlay.methods.lora import LoRA

        pairs = list(members.items() if isinstance(members, Mapping) else members)
        pairs = pairs or [(LoRA(), 0.5), (LoRA(rank=16), 0.5)]
        weights = tuple(float(weight) for _, weight in pairs)
        self.require(
            (
                all(math.isfinite(w) and w for w in weights),
                f"weights are {weights}, expected finite numbers other than 0",
            )
        )
        object.__setattr__(self, "weights", weights)
        self._hold([method for method, _ in pairs])

    def with_members(self, methods: Sequence[Method]) -> Self:
        return type(self)(list(zip(methods, self.weights, strict=True)))

    def branch(self, number: int) -> Branch:
        return Branch("", number, self.weights[number])

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found = super().pieces(view, places)
        if any(isinstance(piece, PromptPiece) for piece in found):
            raise UnsupportedError(
                "method 'average': a prompt has no average, because attention normalises over all its positions; "
                "use Parallel, where prompts stand one after another"
            )
        return found

    @classmethod
    def _of(cls, fields: Mapping[str, Any]) -> Self:
        methods, weights = restored(fields.get("methods", ())), fields.get("weights", ())
        if len(methods) != len(weights):
            cls().require(
                (False, f"there are {len(methods)} methods but {len(weights)} weights; give one weight for each")
            )
        return cls(list(zip(methods, weights, strict=True)))

    @classmethod
    def examples(cls) -> list[Average]:
        from inlay.methods.houlsby import Houlsby
        from inlay.methods.lora import LoRA

        return [
            cls({LoRA(rank=2): 0.5, LoRA(rank=4): 0.5}),
            cls({LoRA(rank=2): 0.75, Houlsby(bottleneck=4): -0.5}),
        ]
