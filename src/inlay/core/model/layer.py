"""How the core reads a layer, whatever stores its weight: functions dispatched on the layer's type.

The files in `bases/` register an implementation for each layer type they know. Nothing else in the project asks how a
layer stores its weight, so a method that works on a dense base works on every base that can be read. A file whose
library may be imported later than inlay registers when a model is inspected (`LATE`).

Canonical layouts:

    linear      weight (out, in), bias (out) or None        also for a transposed Conv1D
    embedding   weight (dim, entries)                       a linear of one-hot inputs
    conv        weight (out, in / groups, *kernel), bias (out) or None
    norm        weight (features), bias (features) or None
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Literal

import torch
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError

Kind = Literal["linear", "embedding", "conv", "norm", "output"]
Undo = Callable[[], None]
# Called before a model is inspected, to register the types of libraries imported since.
LATE: list[Callable[[], None]] = []


@dataclass(frozen=True)
class LayerShape:
    """What a method may know about a layer before it builds anything.

    Attributes:
        kind: which canonical layout the weight has; ``output`` is any other module.
        in_features, out_features: sizes of the canonical weight; equal for a norm.
        bias: whether the layer has one.
        dtype: of the layer's computation (not of a quantised store).
    """

    kind: Kind
    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Store:
    """How a quantised layer stores its weight.

    Attributes:
        name: the format, as `inlay train --quantize` calls it.
        tensors: everything the layer stores.
    """

    name: str
    tensors: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


@singledispatch
def shape_of(layer: nn.Module) -> LayerShape | None:
    """The layer's shape, or None for a type that no file in `bases/` knows."""
    return None


@singledispatch
def read_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The base's weight and bias in canonical layout and computation dtype.

    For a dense layer this is a view of its own storage, not detached; the core has frozen it, so no gradients of the
    base are recorded. A quantised layer's weight is dequantised.
    """
    raise UnsupportedError(
        f"the weight of a {type(layer).__name__} cannot be read: inlay knows dense layers and those of bitsandbytes "
        "and torchao. Choose other layers with `where`, or load the base in one of these formats"
    )


@singledispatch
def write_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Undo:
    """Replace the weight and bias (canonical layout); the returned function puts the same old objects back."""
    raise UnsupportedError(f"a {type(layer).__name__} cannot be written, so nothing can be merged into it")


@singledispatch
def store_of(layer: nn.Module) -> Store | None:
    """How the layer stores its weight if it is quantised, or None for a dense layer."""
    return None


@singledispatch
def requantise_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Undo:
    """`write_weight` that keeps a quantised layer quantised, in its own format; a dense one is simply written."""
    return write_weight(layer, weight, bias)


@singledispatch
def settle(layer: nn.Module, dtype: torch.dtype) -> None:
    """Keep a layer from changing its own stored values while its model has adapters.

    Args:
        dtype: of the model's computation.

    Raises:
        UnsupportedError: it has changed them already, in a way through which gradients cannot flow.
    """


@singledispatch
def unsettle(layer: nn.Module) -> None:
    """The inverse of `settle`; does nothing if the layer was not settled."""


def settle_all(model: nn.Module) -> None:
    """`settle` for every module of a model that has no adapters yet."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    for module in model.modules():
        settle(module, dtypes[0] if dtypes else torch.get_default_dtype())


def unsettle_all(model: nn.Module) -> None:
    for module in model.modules():
        unsettle(module)
