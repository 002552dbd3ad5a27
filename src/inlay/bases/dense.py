"""Dense layers: `nn.Linear`, transformers' transposed `Conv1D`, embeddings, convolutions and norms.

Writing replaces the `Parameter` object instead of its values, so undoing is exact to the bit, and a tied layer (an
output head that shares the embedding's matrix) keeps its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from inlay.core.model.layer import Kind, LayerShape, Undo, read_weight, settle, shape_of, unsettle, write_weight


def raw(layer: nn.Module, name: str) -> Tensor | None:
    """The registered parameter itself, even if an adapter replaces the attribute."""
    return layer._parameters.get(name)


@singledispatch
def values_of(weight: Tensor) -> Tensor:
    """A parameter's values as a plain tensor; overridden for tensor types that pack their values."""
    return weight


def replace(layer: nn.Module, values: Mapping[str, Tensor | None], dtype: torch.dtype) -> Undo:
    """Replace parameters with new frozen ones; the returned function puts the same old objects back."""
    old = {name: raw(layer, name) for name in values}
    for name, value in values.items():
        if value is not None:
            before = old[name]
            wanted = dtype if before is None or not before.is_floating_point() else before.dtype
            layer._parameters[name] = nn.Parameter(value.detach().to(wanted), requires_grad=False)

    return partial(put_back, layer, old)


def put_back(layer: nn.Module, parameters: Mapping[str, Any], back: Undo | None = None, **attributes: Any) -> None:
    """Put a layer's former parameters and attributes back.

    The steps of an undo are partial calls of functions like this one, so that `copy.deepcopy` copies what they act on.
    """
    layer._parameters.update(parameters)
    for name, value in attributes.items():
        setattr(layer, name, value)
    if back is not None:
        back()


def _shape(layer: nn.Module, kind: Kind, out_features: int, in_features: int) -> LayerShape | None:
    weight = raw(layer, "weight")
    if weight is None or not weight.is_floating_point():
        return None  # no weight of its own, or a quantised one that another file reads
    has_bias = raw(layer, "bias") is not None
    return LayerShape(kind, in_features, out_features, has_bias, weight.dtype, weight.device)


@shape_of.register
def _(layer: nn.Linear) -> LayerShape | None:
    return _shape(layer, "linear", layer.out_features, layer.in_features)


@shape_of.register
def _(layer: Conv1D) -> LayerShape | None:
    weight = raw(layer, "weight")
    return None if weight is None else _shape(layer, "linear", weight.shape[1], weight.shape[0])


@shape_of.register
def _(layer: nn.Embedding) -> LayerShape | None:
    return _shape(layer, "embedding", layer.embedding_dim, layer.num_embeddings)


@shape_of.register(nn.Conv1d)
@shape_of.register(nn.Conv2d)
@shape_of.register(nn.Conv3d)
def _(layer: nn.Conv2d) -> LayerShape | None:
    return _shape(layer, "conv", layer.out_channels, layer.in_channels)


@shape_of.register
def _(layer: nn.Module) -> LayerShape | None:
    """A norm is recognised by its name and by having one weight vector: every model has its own RMSNorm class."""
    weight = raw(layer, "weight")
    if (
        type(layer).__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d"))
        and weight is not None
        and weight.ndim == 1
    ):
        return _shape(layer, "norm", weight.shape[0], weight.shape[0])
    return None


def _transposed(layer: nn.Module) -> bool:
    return isinstance(layer, (Conv1D, nn.Embedding))


@read_weight.register
def _(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight = raw(layer, "weight")
    assert weight is not None, "shape_of() answers None for a layer without a weight"
    weight = values_of(weight)
    return (weight.t() if _transposed(layer) else weight), raw(layer, "bias")


@write_weight.register
def _(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Undo:
    before = raw(layer, "weight")
    assert before is not None, "shape_of() answers None for a layer without a weight"
    new = {"weight": weight.t().contiguous() if _transposed(layer) else weight, "bias": bias}
    return replace(layer, new, before.dtype)


@settle.register
def _(layer: PreTrainedModel, dtype: torch.dtype) -> None:
    """transformers' Trainer refuses a quantised model unless PEFT has put adapters on it."""
    if layer.__dict__.get("is_quantized"):
        layer.__dict__["_inlay_settled"], layer.__dict__["is_quantized"] = True, False


@unsettle.register
def _(layer: PreTrainedModel) -> None:
    if layer.__dict__.pop("_inlay_settled", False):
        layer.__dict__["is_quantized"] = True
