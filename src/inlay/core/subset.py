"""The third contract: chosen parameters of the base, trained as a difference.

    θ' = θ + d        d starts at zero, so the base's own values are never written

A difference changes the layer for every row, so a batch that mixes it with other adapters is refused.
Training d instead of θ keeps the base bit-identical, makes switching exact and free, and stores only
what was learnt; a sparse method (FISH mask, LT-SFT) keeps d at its chosen entries alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.layer import store_of
from inlay.core.method import Method
from inlay.core.select import Places

if TYPE_CHECKING:
    from inlay.core.pieces import Piece
    from inlay.core.view import ModelView


class Difference(nn.Module, ABC):
    """What is added to one parameter. Abstract."""

    @abstractmethod
    def apply_to(self, value: Tensor) -> Tensor:
        """The parameter that the model computes with, of `value`'s shape and dtype."""


class DenseDifference(Difference):
    """A difference at every entry."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.difference = nn.Parameter(torch.zeros(like.shape, dtype=dtype, device=like.device))

    def apply_to(self, value: Tensor) -> Tensor:
        return (value + self.difference).to(value.dtype)


class SummedDifference(Difference):
    """Several differences to one parameter, each with its weight; they are stored where their pieces are."""

    def __init__(self, parts: Sequence[tuple[float, Difference]]) -> None:
        super().__init__()
        self.parts = tuple(parts)  # a tuple: the modules belong to their pieces

    def apply_to(self, value: Tensor) -> Tensor:
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        total = wide
        for weight, part in self.parts:
            total = total + weight * (part.apply_to(wide) - wide)
        return total.to(value.dtype)


@dataclass(frozen=True, kw_only=True)
class SubsetMethod(Method, ABC):
    """A method that trains chosen parameters of the base."""

    @abstractmethod
    def choose(self, view: ModelView, places: Places) -> list[str]:
        """Full names of the parameters to train, in the order of the model.

        Raises:
            SelectionError: nothing is chosen.
        """

    def difference(self, name: str, value: Tensor) -> Difference:
        """The trained difference of one parameter; dense unless the method says otherwise."""
        return DenseDifference(value)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        from inlay.core.pieces import SubsetPiece

        found: list[Piece] = []
        for name in self.choose(view, places):
            path, _, parameter = name.rpartition(".")
            value = view.modules[path]._parameters[parameter]
            assert value is not None
            store = store_of(view.modules[path])
            if store is not None and (parameter == "weight" or not value.is_floating_point()):
                raise UnsupportedError(
                    f"method {self.name!r} trains the base's own weights, but {name} is quantised ({store.name}), so "
                    "no small step of it can be taken. Load the base without quantisation, or choose a method that "
                    "adds to it (lora)"
                )
            found.append(SubsetPiece(path, parameter, self.difference(name, value)))
        return found
