"""Layers of bitsandbytes: 4 bits a weight (NF4, FP4; QLoRA, arXiv:2305.14314) and 8 (LLM.int8(), arXiv:2208.07339).

    4 bits   blocks of 64 weights, each one of 16 levels times the block's constant; with double quantisation the
             constants are stored in 8 bits, in blocks of 256
    8 bits   a row of the weight is integers times the row's constant

While merged, such a layer is an `nn.Linear` with the dequantised weight.

On a CPU, bitsandbytes 0.50 uses wrong constants for 4-bit rows of some lengths that are not a multiple of the block
(32, 48, 96, 160); `exact` finds these out, and such layers are refused.

On CPUs with AVX512-BF16 a 4-bit layer repacks itself in its first forward without gradients: its constants are rounded
to bfloat16, and from then on no gradient passes through it. `settle` prevents that.
"""

from __future__ import annotations

import copy
import logging
from functools import cache, partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from inlay.bases.dense import put_back, raw, replace
from inlay.core.class_exchange import exchange
from inlay.core.errors import UnsupportedError
from inlay.core.model.layer import (
    LayerShape,
    Store,
    Undo,
    read_weight,
    requantise_weight,
    settle,
    shape_of,
    store_of,
    unsettle,
    write_weight,
)

Linear4bit, Linear8bitLt = bnb.nn.Linear4bit, bnb.nn.Linear8bitLt
# It warns at every forward of an 8-bit layer that inputs are rounded, which is how such a layer works.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _shape(layer: Any, dtype: torch.dtype) -> LayerShape:
    weight, has_bias = raw(layer, "weight"), raw(layer, "bias") is not None
    assert weight is not None
    return LayerShape("linear", layer.in_features, layer.out_features, has_bias, dtype, weight.device)


def _written(layer: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Undo:
    """Replace a quantised layer by a dense one; the returned function puts the same old objects back."""
    back = exchange(layer, nn.Linear)
    before = {name: raw(layer, name) for name in ("weight", "bias")}
    replace(layer, {"weight": weight, "bias": bias}, dtype)
    return partial(put_back, layer, before, back)


# -- 4 bits -------------------------------------------------------------------------------------


def _state(layer: Any) -> Any:
    """The constants of a 4-bit layer; None before it is quantised."""
    state = getattr(raw(layer, "weight"), "quant_state", None) or layer.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedError(
            "bitsandbytes has repacked this 4-bit base for inference on the CPU: its constants were rounded, and no "
            "gradient passes through it. Load the base again and attach before the first forward in evaluation mode, "
            "or let inlay load it (--quantize nf4)"
        )
    return state


@shape_of.register(Linear4bit)
def _(layer: Any) -> LayerShape:
    state, weight = layer.quant_state, raw(layer, "weight")
    return _shape(layer, weight.dtype if state is None else state.dtype)  # type: ignore[union-attr]


@read_weight.register(Linear4bit)
def _(layer: Any) -> tuple[Tensor, Tensor | None]:
    state, weight = _state(layer), raw(layer, "weight")
    assert weight is not None
    values = weight if state is None else bnb.functional.dequantize_4bit(weight.data.view(-1, 1), state)
    return values, raw(layer, "bias")


@write_weight.register(Linear4bit)
def _(layer: Any, weight: Tensor, bias: Tensor | None) -> Undo:
    return _written(layer, weight, bias, _state(layer).dtype)


@store_of.register(Linear4bit)
def _(layer: Any) -> Store | None:
    state, weight = _state(layer), raw(layer, "weight")
    if state is None:
        return None
    assert weight is not None
    nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
    return Store(state.quant_type, (weight.data, state.absmax, *nested))


@requantise_weight.register(Linear4bit)
def _(layer: Any, weight: Tensor, bias: Tensor | None) -> Undo:
    state, before = _state(layer), {name: raw(layer, name) for name in ("weight", "bias")}
    replace(layer, {"bias": bias}, state.dtype)
    made = bnb.nn.Params4bit(
        weight.detach().to(state.dtype),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        module=layer,
    )
    layer._parameters["weight"] = made.to(weight.device)
    return partial(put_back, layer, before, quant_state=state)


@cache
def exact(width: int, kind: str, block: int) -> bool:
    """Whether the CPU's kernel computes rows of this length correctly."""
    weight = torch.randn(block, width, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type=kind)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1, block).long()
    plain = (state.code[codes] * state.absmax[:, None]).view(weight.shape)
    return torch.allclose(bnb.functional.dequantize_4bit(packed, state), plain, rtol=1e-4, atol=1e-6)


@settle.register(Linear4bit)
def _(layer: Any, dtype: torch.dtype) -> None:
    state, weight = _state(layer), raw(layer, "weight")  # raises if the layer has repacked itself
    on_cpu = state is not None and weight is not None and weight.device.type == "cpu"
    if on_cpu and not exact(state.shape[-1], state.quant_type, state.blocksize):
        raise UnsupportedError(
            f"bitsandbytes {bnb.__version__} computes 4-bit rows of {state.shape[-1]} numbers wrongly on the CPU. "
            "Quantise this base to 8 bits, or leave it as it is"
        )
    layer._inlay_settled, layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu, False


@unsettle.register(Linear4bit)
def _(layer: Any) -> None:
    if "_inlay_settled" in layer.__dict__:
        layer.support_avx512bf16_for_cpu = layer.__dict__.pop("_inlay_settled")


# -- 8 bits -------------------------------------------------------------------------------------


def _rows(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Integers and constants of the rows; the first forward moves them from the weight to the layer's state."""
    weight: Any = raw(layer, "weight")
    if layer.state.CB is not None:
        return layer.state.CB, layer.state.SCB
    return weight.CB, weight.SCB


def _dtype(layer: Any) -> torch.dtype:
    """The dtype of the layer's computation, which an 8-bit layer does not store."""
    bias = raw(layer, "bias")
    found: torch.dtype = torch.float32 if bias is None else bias.dtype
    return layer.__dict__.get("_inlay_dtype", found)  # type: ignore[no-any-return]


@shape_of.register(Linear8bitLt)
def _(layer: Any) -> LayerShape:
    return _shape(layer, _dtype(layer))


@read_weight.register(Linear8bitLt)
def _(layer: Any) -> tuple[Tensor, Tensor | None]:
    (whole, constants), weight = _rows(layer), raw(layer, "weight")
    assert weight is not None
    if whole is None or constants is None:
        return weight, raw(layer, "bias")
    return whole.to(_dtype(layer), copy=True).mul_(constants.unsqueeze(1) * (1 / 127)), raw(layer, "bias")


@write_weight.register(Linear8bitLt)
def _(layer: Any, weight: Tensor, bias: Tensor | None) -> Undo:
    return _written(layer, weight, bias, _dtype(layer))


@store_of.register(Linear8bitLt)
def _(layer: Any) -> Store | None:
    whole, constants = _rows(layer)
    return None if whole is None or constants is None else Store("int8", (whole, constants))


@requantise_weight.register(Linear8bitLt)
def _(layer: Any, weight: Tensor, bias: Tensor | None) -> Undo:
    before, state = {name: raw(layer, name) for name in ("weight", "bias")}, layer.state
    replace(layer, {"bias": bias}, _dtype(layer))
    layer.state = copy.copy(state)
    layer.state.reset_grads()
    made = bnb.nn.Int8Params(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    layer._parameters["weight"] = made.to(weight.device)
    return partial(put_back, layer, before, state=state)


@settle.register(Linear8bitLt)
def _(layer: Any, dtype: torch.dtype) -> None:
    layer._inlay_dtype = dtype


@unsettle.register(Linear8bitLt)
def _(layer: Any) -> None:
    layer.__dict__.pop("_inlay_dtype", None)
