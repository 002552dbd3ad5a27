"""Parallel: methods beside one another, as one adapter.

He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366, section 3.3:
designs are combined by adding what each contributes.

    y + Σᵢ (postᵢ(x, y) − y)          all read the base's own x and y          W + Σᵢ (Wᵢ − W)
    x + Σᵢ (preᵢ(x) − x)              for those that change what enters a linear layer

A method that changes a layer's input cannot be combined with one that reads its output: the second would see the effect
of the first, and the two views would differ. That is refused; use `Stack`. Prompts stand one after another in front of
the text; differences to the same parameter add up. It merges if all its methods do.

Not to be confused with ``--method parallel``, the class `ParallelAdapter` (`methods/parallel.py`): a bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import Branch, Method
from inlay.methods._composition import Composition


@dataclass(frozen=True, init=False)
class Parallel(Composition):
    """``Parallel(LoRA(rank=4), Houlsby())``: methods beside one another.

    Attributes:
        methods: in any order.
    """

    name: ClassVar[str] = "in-parallel"
    paper: ClassVar[str] = "arXiv:2110.04366"
    table_order: ClassVar[int] = 20

    methods: tuple[Method, ...]

    def __init__(self, *methods: Method) -> None:
        from inlay.methods.lora import LoRA
        from inlay.methods.parallel import ParallelAdapter

        self._hold(methods or (LoRA(), ParallelAdapter()))

    def branch(self, number: int) -> Branch:
        return Branch("", number)

    @classmethod
    def examples(cls) -> list[Parallel]:
        from inlay.methods.houlsby import Houlsby
        from inlay.methods.lora import LoRA
        from inlay.methods.parallel import ParallelAdapter
        from inlay.methods.prefix_tuning import PrefixTuning

        return [
            cls(LoRA(rank=2), Houlsby(bottleneck=4)),
            cls(PrefixTuning(length=3, projection=None), ParallelAdapter(bottleneck=4)),
        ]
