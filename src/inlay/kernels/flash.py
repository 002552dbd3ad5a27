"""A faster backward pass for the CPU's flash attention in half precision.

The forward pass is torch's own kernel, bit for bit. Torch's backward kernel takes more than twice as long, because it
converts and packs small tiles. Here the same products run over some rows of the batch and a block of queries at a time,
large enough for the matrix unit and small enough for the cache, with torch's softmax and its backward, each one pass in
float32 over half-precision data:

    P = softmax(scale · Q Kᵀ)      dV = Pᵀ dO      dS = P ∘ (dO Vᵀ − rowsum(P ∘ dO Vᵀ))      dQ = dS K      dK = dSᵀ Q

In causal attention a block of queries only sees the keys up to its end, so half the work is left out, as in torch's
kernel. This file acts only inside the attention modules of models with adapters. There, every call of
`scaled_dot_product_attention` takes one of three ways:

    `applies`    BlockedBackward   calls for which torch would use that kernel: bfloat16 on a CPU, no dropout, gradients
    `drops`      with_dropout      the formula with the masks of `dropout.py`: torch has no kernel with dropout on a CPU
    neither      torch's own

These two functions decide alone. They look at the call, never at the model, so a call that is accepted by mistake is
to be corrected in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inlay.core.forward.host import Host
from inlay.core.forward.transforms import transformed
from inlay.core.model.view import ModelView
from inlay.core.upstream import flash_on_cpu, safe_softmax, softmax_backward
from inlay.kernels import second_derivatives
from inlay.kernels.alike import alike
from inlay.kernels.dropout import Dropout
from inlay.kernels.masks import MOST, fresh_seed

BLOCK = 128  # queries at a time
AT_ONCE = 2**19  # attention scores at a time, over heads and rows: twice 1 MiB


class FasterBackward(TorchFunctionMode):
    """Within it, attention for which `applies` is true gets the backward pass of this file."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and applies(*args, **given):
            query = args[0]
            scale = given.get("scale") or query.shape[-1] ** -0.5
            mask, causal = given.get("attn_mask"), given.get("is_causal", False)
            return BlockedBackward.apply(*args, mask, causal, scale)  # type: ignore[no-untyped-call]
        if func is F.scaled_dot_product_attention and len(args) == 3 and drops(*args, **given):
            return with_dropout(*args, **given)
        return func(*args, **given)


def applies(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> bool:  # fmt: skip
    """Whether torch would use its flash kernel for the CPU, and a gradient is needed."""
    plain = all(type(t) is Tensor and t.dtype == torch.bfloat16 and t.dim() == 4 for t in (query, key, value))
    return (
        plain
        and query.device.type in ("cpu", "meta")
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and (query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
        and query.shape[-1] == value.shape[-1]
        and query.numel() > 0
        and (not is_causal or query.shape[2] == key.shape[2])
        and dropout_p == 0
        and scale != 0
        and not (attn_mask is not None and (attn_mask.requires_grad or attn_mask.dim() != 4 or is_causal))
        and (query.requires_grad or key.requires_grad or value.requires_grad)
    )


def drops(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0, **_: Any) -> bool:
    """Whether torch would compute this by the formula, with a dropout mask that costs more than the products."""
    return (
        all(type(t) is Tensor and t.dim() == 4 and t.device.type in ("cpu", "meta") for t in (query, key, value))
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and 0 < dropout_p <= MOST
        and not torch.is_autocast_enabled(query.device.type)
    )


def with_dropout(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """drop(softmax(scale · Q Kᵀ + mask)) V, as `scaled_dot_product_attention` documents it.

    Scores and probabilities are in float32, as in torch's kernel: bfloat16 made the error up to five times as large.
    """
    if enable_gqa:
        key, value = (_repeated(t, query.shape[1]) for t in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.to(wide) * scale) @ key.to(wide).transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    shares = safe_softmax(scores, -1).to(query.dtype)
    kept: Tensor = Dropout.apply(shares, dropout_p, fresh_seed())  # type: ignore[no-untyped-call]
    return kept @ value


class BlockedBackward(torch.autograd.Function):
    """Described at the top of this file. Query, key and value are (rows, heads, tokens, size)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        kernel = flash_on_cpu
        shared = (_repeated(t, query.shape[1]) for t in (key, value))
        out, _ = kernel(query, *shared, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal, ctx.scale = causal, scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        second_derivatives.refuse("flash attention", "load the model with attn_implementation='eager'")
        query, key, value, mask = ctx.saved_tensors
        made = [torch.empty_like(t) for t in (query, key, value)]
        size = query.shape[1] * min(BLOCK, query.shape[2]) * key.shape[2]
        rows = max(1, AT_ONCE // size) if mask is None else 1
        for start in alike(range(0, query.shape[0], rows)):
            at = slice(start, start + rows)
            added = None if mask is None else mask[start if mask.shape[0] > 1 else 0]
            parts = (_repeated(t[at], query.shape[1]) for t in (grads[0], query, key, value))
            grad, q, k, v = (t.contiguous().flatten(0, 1) for t in parts)
            for whole, part in zip(made, _gradients(grad, q, k, v, added, ctx.causal, ctx.scale), strict=True):
                own = whole[at]
                sharing = query.shape[1] // own.shape[1]  # query heads for each head of keys and values
                apart = part.view(*own.shape[:2], sharing, *own.shape[2:])
                own.copy_(apart[:, :, 0] if sharing == 1 else apart.sum(2))
        return *made, None, None, None


def _repeated(given: Tensor, heads: int) -> Tensor:
    """Keys or values repeated to as many heads as the queries have, for grouped attention."""
    return given if given.shape[1] == heads else given.repeat_interleave(heads // given.shape[1], 1)


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, (heads, tokens, size) each; those of key and value in float32 if summed.

    Args:
        added: the additive mask, (heads or 1, queries or 1, keys), in the queries' dtype or wider.
    """
    heads, tokens, keys = query.shape[0], query.shape[1], key.shape[1]
    if added is not None:
        blind = added.amax(-1, keepdim=True) == float("-inf")  # queries that see no key: the kernel returns zero
        added, grad = added.masked_fill(blind, 0), grad.masked_fill(blind, 0)
        added = _narrowed(added, query.dtype).expand(-1, tokens, -1)
    room = query.new_empty(2, heads * min(BLOCK, tokens) * keys)
    d_query = torch.empty_like(query)
    d_key = d_value = None
    for start in alike(range(0, tokens, BLOCK)[::-1]):
        at = slice(start, min(start + BLOCK, tokens))
        seen = at.stop if causal else keys
        k, v, q, g = key[:, :seen], value[:, :seen], query[:, at], grad[:, at]
        shape = (heads, at.stop - start, seen)  # (heads, block, seen)
        shares, d_scores = (half[: math.prod(shape)].view(shape) for half in room)
        if causal:
            above = query.new_full(shape[1:], float("-inf")).triu_(start + 1)
        else:
            above = query.new_zeros(()) if added is None else added[:, at]
        torch.baddbmm(above, q, k.transpose(1, 2), beta=0 if above.dim() == 0 else 1, alpha=scale, out=shares)
        torch.softmax(shares, -1, out=shares)
        torch.bmm(g, v.transpose(1, 2), out=d_scores)
        softmax_backward(d_scores, shares, -1, query.dtype, grad_input=d_scores)
        torch.bmm(d_scores, k, out=d_query[:, at])
        of_key, of_value = torch.bmm(d_scores.transpose(1, 2), q), torch.bmm(shares.transpose(1, 2), g)
        if d_key is None or d_value is None:  # the last block, which sees all keys
            d_key, d_value = (t if tokens <= BLOCK else t.float() for t in (of_key, of_value))
        else:
            d_key[:, :seen] += of_key
            d_value[:, :seen] += of_value
    assert d_key is not None and d_value is not None
    return d_query.mul_(scale), d_key.mul_(scale), d_value


def _narrowed(added: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in a narrower dtype. Finite values stay finite, so that no query loses its keys."""
    if added.dtype == dtype:
        return added
    return torch.where(added.isneginf(), added, added.clamp(min=torch.finfo(dtype).min)).to(dtype)


def attention(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An attention module's forward, with the faster backward pass if gradients are needed.

    Dropout masks must not depend on that: a reentrant checkpoint runs the forward first without gradients, then with.
    """
    if transformed() or not (torch.is_grad_enabled() or host.module.training):
        return inner(*args, **kwargs)
    with FasterBackward():
        return inner(*args, **kwargs)


def is_attention(module: nn.Module, view: ModelView) -> bool:
    """Whether a module computes attention itself, that is, has no attention module below it."""
    return "Attention" in type(module).__name__ and not any(is_attention(m, view) for m in module.children())
