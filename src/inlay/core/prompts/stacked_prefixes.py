"""Attention of a mixed batch: the prompts of all its adapters at one module in one stack, without gradients.

    text       the flash kernel, all rows at once
    prompts    one small attention of the rows with prompts, in segments (`core/forward/batched_adapters.py`), each over
               its own
    both       combined by log-sum-exp (`core/prompts/prefix_attention.py`)

The loop over adapters in `core/prompts/attention_function.py` remains as the oracle, and for what cannot be stacked.
Stacks are cached with the route, as long as the tensors they were made of are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.contracts.prompt import KeyValues
from inlay.core.forward.call import Call
from inlay.core.forward.host import Host
from inlay.core.forward.segments import Segments
from inlay.core.prompts import prefix_attention


@dataclass(frozen=True, eq=False)
class StackedPrefixes:
    """The prompts of many rows' adapters at one attention module, stacked; without gradients.

    Attributes:
        sources: the tensors they were made of; the stack is valid while these are the same objects.
        keys, values: (segments, heads, longest length, head size).
        ends: additive mask: 0 for a pair, -∞ beyond the end of a shorter prompt, (segments, 1, 1, longest length).
        gates: (segments, heads); None if the prompts are not gated.
    """

    sources: tuple[Tensor, ...]
    segments: Segments
    keys: Tensor
    values: Tensor
    ends: Tensor
    gates: Tensor | None

    @staticmethod
    def of(names: Sequence[str | None], held: Mapping[str, tuple[Tensor, ...]], query: Tensor) -> StackedPrefixes:
        """Stack the prompts `held` by adapters, for rows with these names."""
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
        return StackedPrefixes(sources, segments, torch.stack(keys), torch.stack(values), ends, gates)

    def attention(self, query: Tensor, scale: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of the rows with prompts over their own, (rows, heads, tokens, size), and its log-sum-exp."""
        segments, tokens = self.segments, query.shape[2]
        count, width = len(segments.owners), segments.width
        slots = query if segments.slots is None else query.index_select(0, segments.slots)
        own = (
            slots.unflatten(0, (count, width)).transpose(1, 2).flatten(2, 3)
        )  # (segments, heads, width * tokens, size)
        scores = prefix_attention.capped(prefix_attention.scores_of(own, self.keys, scale), cap) + self.ends
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp().to(query.dtype) @ self.values

        def by_row(t: Tensor) -> Tensor:
            rows: Tensor = t.unflatten(2, (width, tokens)).transpose(1, 2).flatten(0, 1)
            return rows if segments.back is None else rows.index_select(0, segments.back)

        return by_row(out), by_row(lse)

    def gates_by_row(self) -> Tensor:
        """The gates of each row, (rows, heads)."""
        assert self.gates is not None
        each = self.gates.repeat_interleave(self.segments.width, 0)
        return each if self.segments.back is None else each.index_select(0, self.segments.back)


def prefixes(host: Host, call: Call, query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> StackedPrefixes | None:
    """The stacked prefixes of a mixed batch at this module; None if they cannot be computed at once."""
    if call.stacks is None or not prefix_attention.fusible(query, value, [], kwargs):
        return None
    return stacked(host, call, query, call.prefixes, 2)


def stacked(
    host: Host, call: Call, query: Tensor, prompts: Mapping[str, KeyValues], parts: int
) -> StackedPrefixes | None:
    """A mixed batch's prompts at a module, stacked, `parts` tensors each; None if there are none or some have more."""
    if call.stacks is None or torch.is_grad_enabled():
        return None
    held = {n: own[host.path] for n in call.route.used if (own := prompts.get(n)) is not None and host.path in own}
    if not held or any(len(pair) != parts for pair in held.values()):
        return None
    key = (host.path, parts, query.shape[:2], query.dtype)
    found: StackedPrefixes | None = call.stacks.beside.get(key)
    sources = [t for pair in held.values() for t in pair]
    if found is None or len(found.sources) != len(sources) or not all(map(operator.is_, found.sources, sources)):
        found = call.stacks.beside[key] = StackedPrefixes.of(call.route.names_for(query.shape[0]), held, query)
    return found


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, prefixes: StackedPrefixes,
    *, scaling: float | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The flash kernel on the text and one small attention on all prefixes: (rows, tokens, heads, head size)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = prefix_attention.flash(
        query, *prefix_attention.for_flash(module, query, key, value, mask, kwargs), scale
    )
    both, _lse = prefix_attention.merged(out, lse, prefixes.segments.rows, *prefixes.attention(query, scale))
    return both.transpose(1, 2)
