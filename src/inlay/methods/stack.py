"""Stack: methods one after another, as one adapter.

The composition block of Poth et al. 2023, "Adapters: A Unified Library for Parameter-Efficient and Modular Transfer
Learning", arXiv:2311.11077, section 4, here for any methods and not only for bottlenecks.

    layer₀ = the base's;  layerᵢ = methodᵢ around layerᵢ₋₁          at every place that several methods share

So each method's `post` sees the output of the one before it, and the last one's `pre` runs first; in weights
W ← weight_n(… weight₁(W)). Prompts stand one after another, and virtual tokens see the key/value pairs; differences to
the same parameter add up. It merges if all its methods do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import Method
from inlay.methods._composition import Composition


@dataclass(frozen=True, init=False)
class Stack(Composition):
    """``Stack(IA3(), LoRA(rank=4))``: methods one after another.

    Attributes:
        methods: the members; the first is nearest to the base.
    """

    name: ClassVar[str] = "stack"
    paper: ClassVar[str] = "arXiv:2311.11077"
    table_order: ClassVar[int] = 10

    methods: tuple[Method, ...]

    def __init__(self, *methods: Method) -> None:
        from inlay.methods.ia3 import IA3
        from inlay.methods.lora import LoRA

        self._hold(methods or (IA3(), LoRA()))

    @classmethod
    def examples(cls) -> list[Stack]:
        from inlay.methods.houlsby import Houlsby
        from inlay.methods.ia3 import IA3
        from inlay.methods.lora import LoRA
        from inlay.methods.pfeiffer import Pfeiffer

        return [cls(IA3(), LoRA(rank=2)), cls(Houlsby(bottleneck=4), Pfeiffer(reduction=2))]
