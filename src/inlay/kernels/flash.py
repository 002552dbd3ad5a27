"""A faster backward pass for the CPU's flash attention in half precision.

The forward pass is torch's own kernel, bit for bit. Its backward kernel takes more than twice as long, because it
converts and packs small tiles; here the same products run a row of the batch and a block of queries at a time,
large enough for the matrix unit and small enough for the cache:

    P = e^(scale · Q Kᵀ − l)      dV = Pᵀ dO      dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O))      dQ = dS K      dK = dSᵀ Q

Queries before a block's last key are all that a causal block touches, so half the work is left out as in the kernel.
It acts inside the attention modules of attached models, on calls of `scaled_dot_product_attention` that the kernel
would have taken; every other call is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inlay.core import prompting
from inlay.core.host import Host

BLOCK = 128  # queries at a time


class FasterBackward(TorchFunctionMode):
    """While it is on, attention that `applies` to is differentiated here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and applies(*args, **given):
            query = args[0]
            scale = given.get("scale") or query.shape[-1] ** -0.5
            mask, causal = given.get("attn_mask"), given.get("is_causal", False)
            return FlashAttention.apply(*args, mask, causal, scale)  # type: ignore[no-untyped-call]
        return func(*args, **given)


def applies(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> bool:  # fmt: skip
    """Whether torch would take its flash kernel for the CPU, and a gradient is wanted."""
    plain = all(type(t) is Tensor and t.dtype == torch.bfloat16 and t.dim() == 4 for t in (query, key, value))
    return (
        plain
        and query.device.type in ("cpu", "meta")
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[-1] == value.shape[-1]
        and query.numel() > 0
        and (not is_causal or query.shape[2] == key.shape[2])
        and dropout_p == 0
        and not (attn_mask is not None and (attn_mask.requires_grad or attn_mask.dim() != 4 or is_causal))
        and (query.requires_grad or key.requires_grad or value.requires_grad)
    )


class FlashAttention(torch.autograd.Function):
    """See the module; (rows, heads, tokens, size) each."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, mask, out, lse = ctx.saved_tensors
        made = [torch.empty_like(t) for t in (query, key, value)]
        for row in range(query.shape[0]):
            added = None if mask is None else mask[row if mask.shape[0] > 1 else 0]
            given = (grads[0][row], query[row], key[row], value[row], out[row], lse[row], added)
            for whole, part in zip(made, _row(*given, ctx.causal, ctx.scale), strict=True):
                whole[row].copy_(part)
        return *made, None, None, None


def _row(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, added: Tensor | None,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of one row of the batch: (heads, tokens, size) each, keys' and values' in float32."""
    query, key, value, grad = (t.contiguous() for t in (query, key, value, grad))
    tokens = query.shape[1]
    total = (grad.float() * out).sum(-1, keepdim=True)  # (heads, tokens, 1)
    d_query = torch.empty_like(query)
    d_key, d_value = (torch.zeros(t.shape, dtype=torch.float32) for t in (key, value))
    for start in range(0, tokens, BLOCK):
        at = slice(start, min(start + BLOCK, tokens))
        seen = at.stop if causal else key.shape[1]
        k, v, q, g = key[:, :seen], value[:, :seen], query[:, at], grad[:, at]
        scores = torch.bmm(q, k.transpose(1, 2)).float()  # (heads, block, seen)
        scores = torch.add(-lse[:, at, None], scores, alpha=scale, out=scores)
        shares = (scores if added is None else scores.add_(added[:, at, :seen])).exp_()
        if causal:
            shares[..., start:].tril_()
        half = shares.to(query.dtype)
        d_scores = torch.bmm(g, v.transpose(1, 2)).float().sub_(total[:, at]).mul_(shares).to(query.dtype)
        d_value[:, :seen] += torch.bmm(half.transpose(1, 2), g)
        d_key[:, :seen] += torch.bmm(d_scores.transpose(1, 2), q)
        d_query[:, at] = torch.bmm(d_scores, k)
    return d_query.mul_(scale), d_key.mul_(scale), d_value


def attention(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An attention module's forward, with the faster backward pass where gradients are wanted."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return inner(*args, **kwargs)
    with FasterBackward():
        return inner(*args, **kwargs)


def is_attention(module: nn.Module) -> bool:
    """A module that computes attention itself: none of its children is one."""
    return "Attention" in type(module).__name__ and not any(is_attention(m) for m in module.children())


prompting.WRAPPERS["flash"] = attention
prompting.RECOGNISED["flash"] = is_attention
