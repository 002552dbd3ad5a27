"""Weights of torchao: int8 (a constant a row) and int4 (a constant and an offset for each group of weights).

torchao keeps an `nn.Linear` and packs its parameter into a tensor type of its own. Here a `PackedLinear` computes with
it, which unpacks the weight in the forward and again in the backward pass: torchao's own int8 product would keep a
dense weight for the backward pass, and its int4 product for the CPU has no derivative.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor

from inlay.bases.dense import put_back, raw, replace, values_of
from inlay.core.class_exchange import exchange
from inlay.core.errors import UnsupportedError
from inlay.core.model.layer import Store, Undo, requantise_weight, settle, shape_of, store_of, unsettle
from inlay.core.upstream import int4_tensor, pack_int4

Int4OpaqueTensor = int4_tensor()
NAMES: dict[type[Tensor], str] = {Int8Tensor: "torchao-int8", Int4OpaqueTensor: "torchao-int4"}
LEVELS = 16  # levels of int4
AT_ONCE = (64, 32, 16)  # numbers of rows that different CPUs pack together


class PackedLinear(nn.Linear):
    """A linear layer whose weight is unpacked when needed and not kept."""

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = PackedProduct.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return made


class PackedProduct(torch.autograd.Function):
    """x Wᵀ + b for a packed W. The backward pass uses the packed W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, values_of(weight).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ values_of(ctx.weight).to(grads[0].dtype), None, None


# Its forward is exactly the product with its weight, as in `nn.Linear`.
shape_of.register(PackedLinear)(shape_of.dispatch(nn.Linear))


@values_of.register(TorchAOBaseTensor)
def _(weight: Any) -> Tensor:
    values: Tensor = weight.dequantize()
    return values


@values_of.register(Int4OpaqueTensor)
def _(weight: Any) -> Tensor:
    codes = _unpacked(weight.qdata, *weight.shape)  # (out, in)
    pairs = weight.scale_and_zero.transpose(0, 1)  # (out, groups, 2)
    groups = codes.view(*pairs.shape[:2], -1)  # (out, groups, group)
    values: Tensor = (groups.to(pairs.dtype) - LEVELS // 2) * pairs[..., :1] + pairs[..., 1:]
    return values.reshape(weight.shape)


def _unpacked(packed: Tensor, rows: int, width: int) -> Tensor:
    """The codes, (rows, width), of a weight that torch has packed for this CPU.

    Rows are packed in blocks: a block's bytes are (width, rows / 2), two rows in a byte.
    """
    block, codes, flat = _block(), [], packed.reshape(-1)
    whole = rows - rows % block
    for start, count, height in ((0, whole // block, block), (whole, 1, rows - whole)):
        if not height or not count:
            continue
        part = flat[start * width // 2 : (start + count * height) * width // 2].view(count, width, height // 2)
        both = torch.cat([part & 0xF, part >> 4], dim=2)  # (blocks, width, height), rows out of order
        ordered = both.index_select(2, _order(height)).transpose(1, 2)  # (blocks, height, width)
        codes.append(ordered.reshape(-1, width))
    return torch.cat(codes)


@cache
def _block() -> int:
    """How many rows this CPU packs together, found by packing a known weight."""
    known = torch.arange(128, dtype=torch.int32).view(-1, 1).mul(torch.tensor([3, 5])).remainder(LEVELS).int()
    packed = _pack(known).reshape(-1)
    for block in AT_ONCE:
        part = packed.view(-1, 2, block // 2)
        both = torch.cat([part & 0xF, part >> 4], dim=2).index_select(2, _order(block)).transpose(1, 2)
        if torch.equal(both.reshape(-1, 2).int(), known):
            return block
    raise UnsupportedError("torchao packs int4 weights in an unknown way on this CPU; choose nf4")


@cache
def _order(height: int) -> Tensor:
    """Where each row of a block lies: first the low, then the high halves of its bytes."""
    rows = torch.arange(height, dtype=torch.int32).view(-1, 1).expand(-1, 2).contiguous()
    digits = []
    for digit in (rows % LEVELS, rows // LEVELS):
        part = _pack(digit).reshape(2, height // 2)[0]
        digits.append(torch.cat([part & 0xF, part >> 4]).long())
    return torch.argsort(digits[0] + LEVELS * digits[1])


def _pack(codes: Tensor) -> Tensor:
    packed: Tensor = pack_int4(codes.contiguous(), 1)
    return packed


@store_of.register(nn.Linear)
def _(layer: nn.Linear) -> Store | None:
    weight: Any = raw(layer, "weight")
    if not isinstance(weight, TorchAOBaseTensor):
        return None
    name = NAMES.get(type(weight), f"torchao-{type(weight).__name__}")
    return Store(name, tuple(getattr(weight, part) for part in weight.tensor_data_names))


@requantise_weight.register(nn.Linear)
def _(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> Undo:
    before: Any = raw(layer, "weight")
    if not isinstance(before, TorchAOBaseTensor):
        return replace(layer, {"weight": weight, "bias": bias}, weight.dtype)
    whole = {"weight": before, "bias": raw(layer, "bias")}
    replace(layer, {"bias": bias}, before.dtype)
    layer._parameters["weight"] = nn.Parameter(_again(before, weight.detach().to(before.dtype)), requires_grad=False)
    return partial(put_back, layer, whole)


def _again(before: Any, weight: Tensor) -> Tensor:
    """New values in an old weight's format."""
    if isinstance(before, Int4OpaqueTensor):
        made: Tensor = Int4OpaqueTensor.from_hp(weight.contiguous(), list(before.block_size))
        return made
    if not isinstance(before, Int8Tensor):
        raise UnsupportedError(f"weights cannot be put back into a {type(before).__name__}; merge without requantising")
    shell = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    shell.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(shell, Int8WeightOnlyConfig())
    return shell.weight


@settle.register(nn.Linear)
def _(layer: nn.Linear, dtype: torch.dtype) -> None:
    if isinstance(raw(layer, "weight"), TorchAOBaseTensor) and type(layer) is nn.Linear:
        exchange(layer, PackedLinear)
        layer.__dict__["_inlay_settled"] = True


@unsettle.register(PackedLinear)
def _(layer: PackedLinear) -> None:
    if layer.__dict__.pop("_inlay_settled", False):
        exchange(layer, nn.Linear)
