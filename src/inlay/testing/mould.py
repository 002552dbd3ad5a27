"""Copies of one model, many times: the laws build thousands."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

from torch import Tensor, nn


class Mould:
    """Makes what `copy.deepcopy` of a model makes, in a fifth of its time.

    Everything but the tensors is pickled once. Each copy reads that back and gets tensors of its own, shared within
    the copy where the model shares them. A model that cannot be pickled (a class inside of a function) is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model  # kept, because tensors are told apart by their ids
        self._tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.persistent_id = self._number  # type: ignore[method-assign]
        try:
            pickler.dump(model)
        except (pickle.PicklingError, AttributeError, TypeError):
            self._rest = None
        else:
            self._rest = file.getvalue()

    def cast(self) -> nn.Module:
        """A copy that shares nothing with the model, nor with other copies."""
        if self._rest is None:
            return copy.deepcopy(self._model)
        memo: dict[int, Any] = {}
        reader = pickle.Unpickler(io.BytesIO(self._rest))
        reader.persistent_load = lambda number: copy.deepcopy(self._tensors[number], memo)  # type: ignore[method-assign]
        model: nn.Module = reader.load()
        return model

    def _number(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._tensors)
            self._tensors.append(value)
        return self._numbers[id(value)]
