"""Attention with key/value pairs in front of the text's own.

Softmax over two segments is two softmaxes weighted by their log-sum-exp, so the text's attention stays as
it is (causal, masked, cached, grouped) and the prefix is a second, small attention beside it:

    out = e^(l_text − l) · text + e^(l_prefix − l) · prefix         l = log(e^l_text + e^l_prefix)

`naive` computes one softmax over both segments; it is exact, handles dropout and soft-capping, and is the
oracle of `fused`, which runs the CPU's flash kernel on the text. In the backward pass each segment's kernel
is given the *merged* output and log-sum-exp: dS = P ∘ (dP − rowsum(dO ∘ O)) holds for every part of the row.

The function is registered with transformers once for each implementation it stands before, for attention and
for masks alike: without the second, the mask would arrive as None and padded rows would be silently wrong.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from inlay.core.call import Call
from inlay.core.errors import UnsupportedError
from inlay.core.grouped import Segments
from inlay.core.host import Host, thread
from inlay.core.prompt import KeyValues

PREFIX = "inlay_"
Attended: TypeAlias = tuple[Tensor, Tensor | None]


def implementation(original: str) -> str:
    """The registered name that stands before `original` (``sdpa``, ``eager``, …)."""
    if PREFIX in original:
        return original
    name = PREFIX + original
    if name not in AttentionInterface._global_mapping:
        if original.removeprefix("packed_") not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"prompts work with the attention implementations sdpa and eager, not {original!r}: load the model "
                "with attn_implementation='sdpa'"
            )
        masks = AttentionMaskInterface._global_mapping

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
        ) -> Attended:
            return attend(original, module, query, key, value, mask, **kwargs)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, masks[original])
    return name


def attend(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Attended:
    """One attention module's work: the base's own where no row has a prefix here.

    Args:
        query: (rows, heads, tokens, head size); key, value: (rows, key heads, keys, head size).

    Returns:
        (rows, tokens, heads, head size), and the attention weights over the text where the base gives them.
    """
    host: Host | None = module.__dict__.get("_inlay_host")
    call = host.roster.call.get() if host is not None else None
    if host is None or call is None:
        return _base(original, module)(module, query, key, value, mask, **kwargs)
    if call.capture is not None:
        call.capture[host.path] = (key[0], value[0])
    together = _together(host, call, query, value, kwargs)
    prefixes = _prefixes(host, call, query) if together is None else []
    if together is not None:
        _refuse(host, call, key, kwargs)
        out, weights = fused(module, query, key, value, mask, together, **kwargs), None
    elif not prefixes:
        out, weights = _base(original, module)(module, query, key, value, mask, **kwargs)
    else:
        _refuse(host, call, key, kwargs)
        if fusible(query, value, prefixes, kwargs):
            out, weights = fused(module, query, key, value, mask, prefixes, **kwargs), None
        else:
            out, weights = naive(module, query, key, value, mask, prefixes, **kwargs)
    return _with_gated(host, call, module, query, out, **kwargs), weights


def _with_gated(
    host: Host, call: Call, module: nn.Module, query: Tensor, out: Tensor,
    *, scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """The text's attention plus each gated prompt's own, times its gate a head: (rows, tokens, heads, size)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    together = None if dropout and module.training else _stacked(host, call, query, call.gated, 3)
    if together is not None:
        own, _lse = together.attention(query, scale, softcap)
        added = (own * together.gates_by_row()[:, :, None, None]).transpose(1, 2)
        return out.index_add(0, together.segments.rows, added)
    for name in call.route.used:
        held = call.gated.get(name, {}).get(host.path)
        if held is None:
            continue
        index = None if call.route.single else call.route.index(name, query)
        at: Any = slice(None) if index is None else index
        keys, values = (t.to(query.dtype).repeat_interleave(query.shape[1] // t.shape[0], 0) for t in held[:2])
        scores = _capped(_scores(query[at], keys, scale), softcap)
        shares = nn.functional.dropout(scores.softmax(-1).to(query.dtype), dropout, training=module.training)
        own = shares @ values  # (rows, heads, tokens, size)
        added = (own * held[2].to(query.dtype)[:, None, None]).transpose(1, 2)
        out = out + added if index is None else out.index_add(0, index, added)
    return out


Prefix: TypeAlias = tuple[Tensor | None, Tensor, Tensor, Tensor | None]
"""Row indices (None for all), keys and values (key heads, length, head size), weights (rows, tokens, length)."""


@dataclass(frozen=True, eq=False)
class Together:
    """The prompts of many rows' adapters at one attention module, as one; without gradients.

    Attributes:
        sources: what they were made of: while these are the same objects, so is this.
        keys, values: (segments, heads, longest length, head size).
        ends: 0 where there is a pair and -∞ where a shorter prompt has none, (segments, 1, 1, longest length).
        gates: (segments, heads), where gated.
    """

    sources: tuple[Tensor, ...]
    segments: Segments
    keys: Tensor
    values: Tensor
    ends: Tensor
    gates: Tensor | None

    @staticmethod
    def of(names: Sequence[str | None], held: Mapping[str, tuple[Tensor, ...]], query: Tensor) -> Together:
        """The prompts `held` by adapters, for rows with these names."""
        segments = Segments.of(names, held, query.device)
        repeat = query.shape[1] // next(iter(held.values()))[0].shape[0]
        keys, values = (
            [held[n][i].detach().to(query.dtype).repeat_interleave(repeat, 0) for n in segments.owners] for i in (0, 1)
        )
        lengths = torch.tensor([k.shape[1] for k in keys], device=query.device)
        longest = max(k.shape[1] for k in keys)
        ends = torch.zeros((len(keys), 1, 1, longest), device=query.device)
        ends = ends.masked_fill(
            torch.arange(longest, device=query.device) >= lengths[:, None, None, None], float("-inf")
        )
        pads = [(0, 0, 0, longest - k.shape[1]) for k in keys]
        keys, values = (
            [nn.functional.pad(t, p) for t, p in zip(tensors, pads, strict=True)] for tensors in (keys, values)
        )
        gated = all(len(pair) == 3 for pair in held.values())
        gates = torch.stack([held[n][2].detach().to(query.dtype) for n in segments.owners]) if gated else None
        sources = tuple(t for pair in held.values() for t in pair)
        return Together(sources, segments, torch.stack(keys), torch.stack(values), ends, gates)

    def attention(self, query: Tensor, scale: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """Of the covered rows over their prompts, (rows, heads, tokens, size), and its log-sum-exp, without size."""
        segments, tokens = self.segments, query.shape[2]
        count, width = len(segments.owners), segments.width
        slots = query if segments.slots is None else query.index_select(0, segments.slots)
        own = (
            slots.unflatten(0, (count, width)).transpose(1, 2).flatten(2, 3)
        )  # (segments, heads, width * tokens, size)
        scores = _capped(_scores(own, self.keys, scale), cap) + self.ends
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp().to(query.dtype) @ self.values

        def by_row(t: Tensor) -> Tensor:
            rows: Tensor = t.unflatten(2, (width, tokens)).transpose(1, 2).flatten(0, 1)
            return rows if segments.back is None else rows.index_select(0, segments.back)

        return by_row(out), by_row(lse)

    def gates_by_row(self) -> Tensor:
        """(rows, heads)."""
        assert self.gates is not None
        each = self.gates.repeat_interleave(self.segments.width, 0)
        return each if self.segments.back is None else each.index_select(0, self.segments.back)


def _together(host: Host, call: Call, query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Together | None:
    """The prefixes of a mixed batch here, where one small attention serves them all."""
    if call.stacks is None or not fusible(query, value, [], kwargs):
        return None
    return _stacked(host, call, query, call.prefixes, 2)


def _stacked(host: Host, call: Call, query: Tensor, prompts: Mapping[str, KeyValues], parts: int) -> Together | None:
    """Prompts of a mixed batch at a module, with `parts` tensors each; None where there are none, or some have more."""
    if call.stacks is None or torch.is_grad_enabled():
        return None
    held = {n: own[host.path] for n in call.route.used if (own := prompts.get(n)) is not None and host.path in own}
    if not held or any(len(pair) != parts for pair in held.values()):
        return None
    key = (host.path, parts, query.shape[:2], query.dtype)
    found: Together | None = call.stacks.beside.get(key)
    sources = [t for pair in held.values() for t in pair]
    if found is None or len(found.sources) != len(sources) or not all(map(operator.is_, found.sources, sources)):
        found = call.stacks.beside[key] = Together.of(call.route.names_for(query.shape[0]), held, query)
    return found


def _prefixes(host: Host, call: Call, query: Tensor) -> list[Prefix]:
    found = []
    for name in call.route.used:
        pair = call.prefixes.get(name, {}).get(host.path)
        if pair is not None:
            rows = None if call.route.single else call.route.index(name, query)
            found.append((rows, pair[0].to(query.dtype), pair[1].to(query.dtype), _weights(host, rows, pair[2:])))
    return found


def _weights(host: Host, rows: Tensor | None, held: tuple[Tensor, ...]) -> Tensor | None:
    """How much of each pair every token sees, (rows, tokens, length), where the prompt is weighed."""
    if not held:
        return None
    entered = host.entered[thread()]
    hidden = entered if rows is None else entered[rows]
    return nn.functional.linear(hidden, held[0].to(hidden.dtype), held[1].to(hidden.dtype)).sigmoid()


def _refuse(host: Host, call: Call, key: Tensor, kwargs: dict[str, Any]) -> None:
    window = kwargs.get("sliding_window")
    longest = max([0, *(call.shifts[n] for n in call.route.used if n in call.prefilled)])
    if window is not None and longest and key.shape[2] + longest > window:
        raise UnsupportedError(
            f"{host.path}: {key.shape[2]} tokens behind {longest} virtual ones exceed the sliding window of {window}, "
            "so a prompt that is prefilled once would be seen where the model could not see it; shorten the input"
        )
    if kwargs.get("s_aux") is not None:
        raise UnsupportedError(f"{host.path} has attention sinks, which prompts do not support")


def _base(original: str, module: nn.Module) -> Callable[..., Attended]:
    if original == "eager":
        own: Callable[..., Attended] = sys.modules[type(module).__module__].eager_attention_forward
        return own
    shared: Callable[..., Attended] = AttentionInterface._global_mapping[original]
    return shared


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
        # All rows without a prefix first, and then those that have one again: which rows are left over would be
        # a question about values, and no compiled graph could hold the answer.
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
        scores = _capped(scores, kwargs.get("softcap"))
        scores = scores + nn.functional.pad(bias, (length, 0))
        probabilities = nn.functional.dropout(scores.softmax(-1).to(q.dtype), dropout, training=module.training)
        part = (probabilities if shares is None else probabilities * shares) @ v
        if rows is None:
            out, weights = part, probabilities[..., length:] if len(groups) == 1 else None
        else:
            out = out.index_copy(0, rows, part)
    return out.transpose(1, 2).contiguous(), weights


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _joined(prefix: Tensor, text: Tensor, query: Tensor) -> Tensor:
    """Prefix and text along the keys, repeated for grouped heads."""
    both = torch.cat([prefix[None].expand(text.shape[0], -1, -1, -1), text], dim=2)
    return both.repeat_interleave(query.shape[1] // both.shape[1], dim=1)


def _additive(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """The text's mask and position bias as numbers to add, (rows or 1, heads or 1, tokens, keys), float32.

    With no mask, transformers leaves causality to the kernel; the rule is the one of its own `sdpa`.
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
    """Whether `fused` computes this: on the CPU (or without values), no dropout, soft-capping or trained biases."""
    bias = kwargs.get("position_bias")
    return (
        query.device.type in ("cpu", "meta")
        and not torch.compiler.is_compiling()
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and all(shares is None for *_, shares in prefixes)
        and not kwargs.get("dropout")
        and kwargs.get("softcap") is None
        and not kwargs.get("output_attentions")
        and not (bias is not None and bias.requires_grad)
    )


def fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    prefixes: list[Prefix] | Together, *, scaling: float | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The flash kernel on the text, a small attention on each prefix or one on all, merged by log-sum-exp."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = mask is None and _is_causal(module, query.shape[2], kwargs) and kwargs.get("position_bias") is None
    added = None
    if not causal and (mask is not None or kwargs.get("position_bias") is not None):
        added = _additive(module, query, key, mask, kwargs).to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if isinstance(prefixes, Together):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=added, scale=scale
        )
        return _merged(out, lse, prefixes.segments.rows, *prefixes.attention(query, scale))[0].transpose(1, 2)
    rows = [r for r, *_ in prefixes]
    pairs = [t.repeat_interleave(repeat, 0) for _, k, v, _ in prefixes for t in (k, v)]
    out = MergedAttention.apply(query, key, value, added, causal, scale, rows, *pairs)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def _merged(out: Tensor, lse: Tensor, at: Any, prefix: Tensor, lse_prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over text and prefix, and its log-sum-exp; the first two are written."""
    merged = torch.logaddexp(lse[at], lse_prefix)
    text_share = (lse[at] - merged).exp()[..., None]
    prefix_share = (lse_prefix - merged).exp()[..., None]
    out[at] = (out[at] * text_share + prefix * prefix_share).to(out.dtype)
    lse[at] = merged
    return out, lse


class MergedAttention(torch.autograd.Function):
    """Text and prefixes merged; saves the inputs, the merged output and its log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
                rows: list[Tensor | None], *pairs: Tensor) -> Tensor:  # fmt: skip
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        out, lse = out.clone(), lse.clone()
        for i, index in enumerate(rows):
            at: Any = slice(None) if index is None else index
            scores = _scores(query[at], pairs[2 * i], scale)
            lse_prefix = scores.logsumexp(-1)  # (rows, heads, tokens)
            prefix = (scores - lse_prefix[..., None]).exp().to(query.dtype) @ pairs[2 * i + 1]
            _merged(out, lse, at, prefix, lse_prefix)
        ctx.save_for_backward(query, key, value, mask, out, lse, *pairs)
        ctx.causal, ctx.scale, ctx.rows = causal, scale, rows
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, mask, out, lse, *pairs = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        total = (grad.float() * out.float()).sum(-1, keepdim=True)
        d_pairs: list[Tensor] = []
        for i, index in enumerate(ctx.rows):
            at: Any = slice(None) if index is None else index
            prefix_key, prefix_value = pairs[2 * i], pairs[2 * i + 1]
            p = (_scores(query[at], prefix_key, ctx.scale) - lse[at][..., None]).exp()
            d_p = (grad[at] @ prefix_value.transpose(-1, -2)).float()
            d_scores = (p * (d_p - total[at]) * ctx.scale).to(query.dtype)
            d_query[at] = d_query[at] + d_scores @ prefix_key
            d_pairs += [
                torch.einsum("rhtp,rhtd->hpd", d_scores, query[at]),
                torch.einsum("rhtp,rhtd->hpd", p.to(query.dtype), grad[at]),
            ]
        return d_query, d_key, d_value, None, None, None, None, *d_pairs


def _scores(query: Tensor, prefix_key: Tensor, scale: float) -> Tensor:
    """(rows, heads, tokens, length), float32."""
    return (query @ prefix_key.transpose(-1, -2)).float() * scale
