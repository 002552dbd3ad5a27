"""Top layers: the uppermost layers of the base, the rest frozen.

The variable fine-tuning baseline of Houlsby et al. 2019, arXiv:1902.00751, section 3.3: the top n layers are
trained (with the head, which `modules_to_save` or `inlay train` adds), n from 1 to all.

On an encoder–decoder the layers are the decoder's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import ModelView, Places, Recipe, SelectionError, SubsetMethod, layer_of
from inlay.methods.full import parameter_names


@dataclass(frozen=True, kw_only=True)
class TopLayers(SubsetMethod):
    """The uppermost layers.

    Attributes:
        top: number of layers.
    """

    name: ClassVar[str] = "top-layers"
    paper: ClassVar[str] = "baseline"
    family: ClassVar[str] = "baseline"
    table_order: ClassVar[int] = 10
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-4)
    default_where: ClassVar[str] = "top"

    top: int = 2

    def __post_init__(self) -> None:
        self.require((self.top >= 1, f"top is {self.top}, expected at least 1"))

    def choose(self, view: ModelView, places: Places) -> list[str]:
        if places.where is not None or places.layers is not None:
            raise SelectionError("method 'top-layers' takes the uppermost layers; set `top` to say how many")
        layers = {n: layer for n in parameter_names(view) if (layer := layer_of(n)) is not None}
        if not layers:
            raise SelectionError("this model has no numbered layers, so it has no top layers")
        stack = list(layers.values())[-1][0]
        highest = sorted({number for s, number in layers.values() if s == stack})
        if len(highest) < self.top:
            raise SelectionError(f"top is {self.top}, but {stack} has {len(highest)} layers")
        wanted = highest[-self.top :]
        return [n for n, (s, number) in layers.items() if s == stack and number in wanted]

    @classmethod
    def examples(cls) -> list[TopLayers]:
        return [cls(top=1)]
