"""The attention function of a model with prompts: the text's own attention, and what prompts add to it.

key/value prompts   stand in front of the text's own pairs, under one softmax (`core/prompts/prefix_attention.py`)
gated prompts       have a softmax of their own, whose output is multiplied by a gate per head and added
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.forward.call import Call
from inlay.core.forward.host import Host, thread
from inlay.core.prompts import prefix_attention, stacked_prefixes
from inlay.core.prompts.interface import NAMESPACE, original_attention, registered
from inlay.core.prompts.prefix_attention import Attended, Prefix


def implementation(original: str) -> str:
    """The registered name of our function in front of `original` (``sdpa``, ``eager``, …)."""
    if NAMESPACE in original:
        return original
    if original.removeprefix("packed_") not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"prompts work with the attention implementations sdpa and eager, not {original!r}: load the model "
            "with attn_implementation='sdpa'"
        )
    return registered(NAMESPACE, original, partial(attend, original))


def attend(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Attended:
    """Compute one attention module; by the base's own function if no row has a prompt here.

    Args:
        query: (rows, heads, tokens, head size); key, value: (rows, key heads, keys, head size).

    Returns:
        (rows, tokens, heads, head size), and the attention weights over the text if the base returns them.
    """
    host: Host | None = module.__dict__.get("_inlay_host")
    call = host.roster.call.get() if host is not None else None
    if host is None or call is None:
        return original_attention(original, module)(module, query, key, value, mask, **kwargs)
    if call.capture is not None:
        call.capture[host.path] = (key[0], value[0])
    stack = stacked_prefixes.prefixes(host, call, query, value, kwargs)
    prefixes = _prefixes(host, call, query) if stack is None else []
    if stack is not None:
        _refuse(host, call, key, kwargs)
        out, weights = stacked_prefixes.attend(module, query, key, value, mask, stack, **kwargs), None
    elif not prefixes:
        out, weights = original_attention(original, module)(module, query, key, value, mask, **kwargs)
    else:
        _refuse(host, call, key, kwargs)
        if prefix_attention.fusible(query, value, prefixes, kwargs):
            out, weights = prefix_attention.fused(module, query, key, value, mask, prefixes, **kwargs), None
        else:
            out, weights = prefix_attention.naive(module, query, key, value, mask, prefixes, **kwargs)
    return _with_gated(host, call, module, query, out, **kwargs), weights


def _with_gated(
    host: Host, call: Call, module: nn.Module, query: Tensor, out: Tensor,
    *, scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """The text's attention plus that of each gated prompt times its gates: (rows, tokens, heads, size)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    stack = None if dropout and module.training else stacked_prefixes.stacked(host, call, query, call.gated, 3)
    if stack is not None:
        own, _lse = stack.attention(query, scale, softcap)
        added = (own * stack.gates_by_row()[:, :, None, None]).transpose(1, 2)
        return out.index_add(0, stack.segments.rows, added)
    for name in call.route.used:
        held = call.gated.get(name, {}).get(host.path)
        if held is None:
            continue
        index = None if call.route.single else call.route.index(name, query)
        at: Any = slice(None) if index is None else index
        keys, values = (t.to(query.dtype).repeat_interleave(query.shape[1] // t.shape[0], 0) for t in held[:2])
        scores = prefix_attention.capped(prefix_attention.scores_of(query[at], keys, scale), softcap)
        shares = nn.functional.dropout(scores.softmax(-1).to(query.dtype), dropout, training=module.training)
        own = shares @ values  # (rows, heads, tokens, size)
        added = (own * held[2].to(query.dtype)[:, None, None]).transpose(1, 2)
        out = out + added if index is None else out.index_add(0, index, added)
    return out


def _prefixes(host: Host, call: Call, query: Tensor) -> list[Prefix]:
    found = []
    for name in call.route.used:
        pair = call.prefixes.get(name, {}).get(host.path)
        if pair is not None:
            rows = None if call.route.single else call.route.index(name, query)
            found.append((rows, pair[0].to(query.dtype), pair[1].to(query.dtype), _weights(host, rows, pair[2:])))
    return found


def _weights(host: Host, rows: Tensor | None, held: tuple[Tensor, ...]) -> Tensor | None:
    """How much each pair counts for every token, (rows, tokens, length); None if the prompt is not weighed."""
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
            f"{host.path}: {key.shape[2]} tokens and {longest} virtual ones in front of them exceed the sliding window "
            f"of {window}, so some tokens would see a prompt outside of their window; shorten the input"
        )
    if kwargs.get("s_aux") is not None:
        raise UnsupportedError(f"{host.path} has attention sinks, which prompts do not support")
