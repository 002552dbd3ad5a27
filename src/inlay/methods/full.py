"""Full fine-tuning: every parameter of the base is trained; the baseline for all other methods.

θ' = θ + d          d starts at zero, for all θ; a tied matrix is trained once
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from inlay.authoring import ModelView, Places, Recipe, SelectionError, SubsetMethod


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(SubsetMethod):
    """All parameters. No hyper-parameters."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "baseline"
    family: ClassVar[str] = "baseline"
    table_order: ClassVar[int] = 20
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-4)
    default_where: ClassVar[str] = "everything"

    def choose(self, view: ModelView, places: Places) -> list[str]:
        if places.where is not None or places.layers is not None:
            raise SelectionError("method 'full' trains everything; to train some layers, use 'top-layers'")
        return parameter_names(view)

    @classmethod
    def examples(cls) -> list[FullFineTuning]:
        return [cls()]


def parameter_names(view: ModelView) -> list[str]:
    """Every parameter of the base once, under the first of its names."""
    seen: set[int] = set()
    names = []
    for path, module in view.modules.items():
        for name, value in module._parameters.items():
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                names.append(f"{path}.{name}" if path else name)
    return names
