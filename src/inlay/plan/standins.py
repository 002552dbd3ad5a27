"""What a step on tensors without values must do otherwise, so that it allocates what the real one does.

attention     the meta device has no fused kernel and would keep every probability; the CPU's and the GPU's
              kernels keep query, key, value, output and one number a query
quantised     a 4-bit layer makes its weight in full precision for each product and frees it after it
autocast      torch raises when it is asked about the meta device; the answer is the CPU's
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from inlay.core.upstream import flash_on_cpu

LINEAR = (nn.Linear, Conv1D)


class Standins(TorchFunctionMode):
    """While active, attention and quantised layers allocate as on the device that is planned for.

    Args:
        gpu: kernels of a GPU, which take dropout; the CPU's do not.
        quantised: the layers whose weights are made anew for each product.
    """

    def __init__(self, *, gpu: bool, quantised: set[int] | None = None) -> None:
        super().__init__()
        self.gpu, self.quantised = gpu, quantised or set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, gpu=self.gpu, **kwargs)
        if func is F.linear and self.quantised and len(args) > 1 and id(args[1]) in self.quantised:
            return quantised_product(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is torch.addmm and self.quantised and id(args[2]) in self.quantised:  # transposed, as in GPT-2
            return quantised_product(args[1], args[2].t(), args[0])
        return func(*args, **kwargs)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, gpu: bool = False,
) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` as a device with a fused kernel runs it."""
    trained_mask = attn_mask is not None and attn_mask.requires_grad
    if not query.is_meta or trained_mask or (dropout_p and not gpu) or query.shape[-1] != value.shape[-1]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_empty(attn_mask.shape)  # the kernels add a mask, so each layer makes numbers of it
    out, _ = flash_on_cpu(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
    made: Tensor = out
    return made


def quantised_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for a quantised W, (out, in)."""
    made: Tensor = QuantisedProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return made


class QuantisedProduct(torch.autograd.Function):
    """x Wᵀ + b where W is made for the product, and made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, _made(weight, x), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return torch.matmul(grads[0], _made(ctx.weight, grads[0])), None, None


def _made(weight: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(weight.shape)


@contextmanager
def answering_autocast() -> Iterator[None]:
    """While `torch.is_autocast_enabled` answers for the meta device instead of raising."""
    asked = torch.is_autocast_enabled

    def answer(device_type: str | None = None) -> bool:
        if device_type is None:
            return asked()
        return asked("cpu" if device_type == "meta" else device_type)

    torch.is_autocast_enabled = answer
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked


def quantisable(model: nn.Module, head: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """The linear layers that quantisation takes: those within numbered blocks, so neither heads nor embeddings."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, LINEAR) and module is not head and any(part.isdigit() for part in path.split("."))
    ]
