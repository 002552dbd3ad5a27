"""How the core reads a layer, whatever stores its weight: three functions dispatched on the layer's type.

The rooms under `bases/` register an implementation for each type they know; nothing else in the project
asks what a layer is made of, so a method that works on a dense base works on every base that can be read.

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


@dataclass(frozen=True)
class LayerShape:
    """What a method may know of a layer before it builds anything.

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


@singledispatch
def shape_of(layer: nn.Module) -> LayerShape | None:
    """The layer's shape, or None for a type that no room under `bases/` knows."""
    return None


@singledispatch
def read_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The base's weight and bias in canonical layout and computation dtype, detached from nothing.

    A dense layer's own storage is returned (as a view), so gradients of the base are never recorded:
    the core freezes it. A quantised layer's weight is dequantised.
    """
    raise UnsupportedError(
        f"the weight of a {type(layer).__name__} cannot be read; see docs/methods.md for known bases"
    )


@singledispatch
def write_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Undo:
    """Put new values in, canonical layout; the returned function puts the very same old objects back."""
    raise UnsupportedError(f"a {type(layer).__name__} cannot be written, so nothing can be merged into it")
