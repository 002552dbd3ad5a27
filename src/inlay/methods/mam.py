"""MAM: a short prefix at attention and a wide parallel adapter at the feed-forward.

He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366, section 4.6:
the mix-and-match adapter, Parallel(PrefixTuning(length=30), ParallelAdapter(bottleneck=512, scale=4)). The prefix
goes through the reparameterising MLP in training, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import Method, ModelView, Piece, Places, Recipe
from inlay.methods.in_parallel import Parallel
from inlay.methods.parallel import ParallelAdapter
from inlay.methods.prefix_tuning import PrefixTuning


@dataclass(frozen=True, kw_only=True)
class MAM(Method):
    """Mix-and-match adapter.

    Attributes:
        length: length of the prefix.
        bottleneck: inner size of the parallel adapter.
        scale: factor on the adapter's output.
        projection: inner size of the prefix's MLP; None trains the prefix itself.
    """

    name: ClassVar[str] = "mam"
    paper: ClassVar[str] = "arXiv:2110.04366"
    family: ClassVar[str] = "composition"
    table_order: ClassVar[int] = 40
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)  # of both its parts
    default_where: ClassVar[tuple[str, ...]] = ("mlp_block",)
    expected_failures: ClassVar[Mapping[str, str]] = PrefixTuning.expected_failures

    length: int = 30
    bottleneck: int = 512
    scale: float = 4.0
    projection: int | None = 512

    def __post_init__(self) -> None:
        assert self.composition.methods  # building it checks the sizes

    @property
    def composition(self) -> Parallel:
        return Parallel(
            PrefixTuning(length=self.length, projection=self.projection),
            ParallelAdapter(bottleneck=self.bottleneck, scale=self.scale),
        )

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        return self.composition.pieces(view, places)

    @classmethod
    def examples(cls) -> list[MAM]:
        return [cls(length=3, bottleneck=4, projection=6)]
