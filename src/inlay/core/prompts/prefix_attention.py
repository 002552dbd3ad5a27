"""Prefix attention: attention of a text with prefixes in front, as one softmax over two segments.

That softmax is the sum of two, weighted by their log-sum-exp. So the text's attention stays as it is (causal, masked,
cached, grouped), and the prefix is a second, small attention beside it:

    out = e^(l_text − l) · text + e^(l_prefix − l) · prefix         l = log(e^l_text + e^l_prefix)

`naive` computes one softmax over both segments; it is exact, handles dropout and soft-capping, and is the oracle of
`fused`, which runs the CPU's flash kernel on the text. In the backward pass each segment's kernel gets the *combined*
output and log-sum-exp, because dS = P ∘ (dP − rowsum(dO ∘ O)) holds for every stretch of the row.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from inlay.core.forward.transforms import transformed
from inlay.core.forward.wrappers import enabled
from inlay.core.upstream import flash_on_cpu, flash_on_cpu_backward

Attended: TypeAlias = tuple[Tensor, Tensor | None]
"""(rows, tokens, heads, head size), and the attention weights over the text, or None."""
Prefix: TypeAlias = tuple[Tensor | None, Tensor, Tensor, Tensor | None]
"""Row indices (None for all), keys and values (key heads, length, head size), weights (rows, tokens, length)."""


def naive(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, prefixes: list[Prefix],
    *, scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> Attended:  # fmt: skip
    """One softmax over prefix and text, a group of rows at a time."""
    additive = _additive(module, query, key, mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, weights = query, None
    groups = list(prefixes)
    if all(rows is not None for rows, *_ in prefixes):
        # Compute all rows without a prefix first, then those with one again: which rows have none depends on values,
        # and a compiled graph cannot branch on that.
        none = key.new_zeros((key.shape[1], 0, key.shape[-1]))
        groups.insert(0, (None, none, none[..., : value.shape[-1]], None))
    for rows, prefix_key, prefix_value, shares in groups:
        at: Any = slice(None) if rows is None else rows
        q, bias = query[at], additive[at] if additive.shape[0] > 1 else additive
        k = _joined(prefix_key, key[at], q)
        v = _joined(prefix_value, value[at], q)
        length = prefix_key.shape[1]
        scores = q.float() @ k.float().transpose(2, 3) * scale
        if shares is not None:
            shares = nn.functional.pad(shares, (0, k.shape[2] - length), value=1.0)[:, None]
            scores = scores * shares.float()
        scores = capped(scores, kwargs.get("softcap"))
        scores = scores + nn.functional.pad(bias, (length, 0))
        probabilities = nn.functional.dropout(scores.softmax(-1).to(q.dtype), dropout, training=module.training)
        part = (probabilities if shares is None else probabilities * shares) @ v
        if rows is None:
            out, weights = part, probabilities[..., length:] if len(groups) == 1 else None
        else:
            out = out.index_copy(0, rows, part)
    return out.transpose(1, 2).contiguous(), weights


def capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _joined(prefix: Tensor, text: Tensor, query: Tensor) -> Tensor:
    """Prefix and text concatenated along the keys, repeated for grouped heads."""
    both = torch.cat([prefix[None].expand(text.shape[0], -1, -1, -1), text], dim=2)
    return both.repeat_interleave(query.shape[1] // both.shape[1], dim=1)


def _additive(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """The text's mask and position bias in additive form, (rows or 1, heads or 1, tokens, keys), float32.

    Without a mask, transformers leaves causality to the kernel; the rule is that of its own `sdpa`.
    """
    tokens, keys = query.shape[2], key.shape[2]
    lowest = torch.finfo(torch.float32).min
    if mask is None:
        added = torch.zeros((1, 1, tokens, keys), device=query.device)
        if _is_causal(module, tokens, kwargs):
            added = added.masked_fill(torch.ones_like(added, dtype=torch.bool).triu(keys - tokens + 1), lowest)
    elif mask.dtype == torch.bool:
        added = torch.zeros(mask.shape, device=query.device).masked_fill(~mask, lowest)
    else:
        added = mask[..., :keys].float()
    bias = kwargs.get("position_bias")
    return added if bias is None else (added + bias.float()).clamp(min=lowest)


def _is_causal(module: nn.Module, tokens: int, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return tokens > 1 and bool(getattr(module, "is_causal", True) if given is None else given)


def fusible(query: Tensor, value: Tensor, prefixes: list[Prefix], kwargs: dict[str, Any]) -> bool:
    """Whether `fused` can compute this: on the CPU (or meta), without dropout, soft-capping and trained biases."""
    bias = kwargs.get("position_bias")
    return (
        query.device.type in ("cpu", "meta")
        and not transformed()
        and enabled("prefix-attention")
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and all(shares is None for *_, shares in prefixes)
        and not kwargs.get("dropout")
        and kwargs.get("softcap") is None
        and not kwargs.get("output_attentions")
        and not (bias is not None and bias.requires_grad)
    )


def fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, prefixes: list[Prefix],
    *, scaling: float | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The flash kernel on the text and a small attention on each prefix, combined by log-sum-exp."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    repeat = query.shape[1] // key.shape[1]
    text = for_flash(module, query, key, value, mask, kwargs)
    rows = [r for r, *_ in prefixes]
    pairs = [t.to(query.dtype).repeat_interleave(repeat, 0) for _, k, v, _ in prefixes for t in (k, v)]
    out = MergedAttention.apply(query, *text, scale, rows, *pairs)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def for_flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """The text's keys and values, repeated for grouped heads, its additive mask, and whether it is causal.

    All have the queries' dtype, as the kernel demands: under autocast a rotary embedding widens queries and keys only.
    """
    causal = mask is None and _is_causal(module, query.shape[2], kwargs) and kwargs.get("position_bias") is None
    added = None
    if not causal and (mask is not None or kwargs.get("position_bias") is not None):
        added = _additive(module, query, key, mask, kwargs).to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    key, value = key.to(query.dtype), value.to(query.dtype)
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    return key, value, added, causal


def flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The CPU's flash kernel on a text: (rows, heads, tokens, size), and the log-sum-exp (rows, heads, tokens)."""
    out, lse = flash_on_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse


def merged(out: Tensor, lse: Tensor, at: Any, prefix: Tensor, lse_prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over text and prefix, and their log-sum-exp; `out` and `lse` are overwritten."""
    both = torch.logaddexp(lse[at], lse_prefix)
    text_share = (lse[at] - both).exp()[..., None]
    prefix_share = (lse_prefix - both).exp()[..., None]
    out[at] = (out[at] * text_share + prefix * prefix_share).to(out.dtype)
    lse[at] = both
    return out, lse


class MergedAttention(torch.autograd.Function):
    """Text and prefixes combined; saves the inputs, the combined output and its log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
                rows: list[Tensor | None], *pairs: Tensor) -> Tensor:  # fmt: skip
        out, lse = (t.clone() for t in flash(query, key, value, mask, causal, scale))
        for i, index in enumerate(rows):
            at: Any = slice(None) if index is None else index
            scores = scores_of(query[at], pairs[2 * i], scale)
            lse_prefix = scores.logsumexp(-1)  # (rows, heads, tokens)
            prefix = (scores - lse_prefix[..., None]).exp().to(query.dtype) @ pairs[2 * i + 1]
            merged(out, lse, at, prefix, lse_prefix)
        ctx.save_for_backward(query, key, value, mask, out, lse, *pairs)
        ctx.causal, ctx.scale, ctx.rows = causal, scale, rows
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, mask, out, lse, *pairs = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_query, d_key, d_value = flash_on_cpu_backward(
            grad, query, key, value, out, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        total = (grad.float() * out.float()).sum(-1, keepdim=True)
        d_pairs: list[Tensor] = []
        for i, index in enumerate(ctx.rows):
            at: Any = slice(None) if index is None else index
            prefix_key, prefix_value = pairs[2 * i], pairs[2 * i + 1]
            p = (scores_of(query[at], prefix_key, ctx.scale) - lse[at][..., None]).exp()
            d_p = (grad[at] @ prefix_value.transpose(-1, -2)).float()
            d_scores = (p * (d_p - total[at]) * ctx.scale).to(query.dtype)
            d_query[at] = d_query[at] + d_scores @ prefix_key
            d_pairs += [
                torch.einsum("rhtp,rhtd->hpd", d_scores, query[at]),
                torch.einsum("rhtp,rhtd->hpd", p.to(query.dtype), grad[at]),
            ]
        return d_query, d_key, d_value, None, None, None, None, *d_pairs


def scores_of(query: Tensor, prefix_key: Tensor, scale: float) -> Tensor:
    """(rows, heads, tokens, length), float32."""
    return (query @ prefix_key.transpose(-1, -2)).float() * scale
