"""Packing: several texts in one sequence, each computed as if it were alone.

    padded   a a a · ·        packed   a a a b b c c c c c        positions   0 1 2 0 1 0 1 2 3 4
             b b · · ·                 └─┬─┘ └┬┘ └───┬───┘
             c c c c c                 attention one text at a time, without a mask

Everything but attention treats tokens one by one, so packing is exact if attention is. A registered attention function
separates the queries, keys and values of each text and passes them to the model's own implementation. No mask is
needed: texts of similar length share a call, and the shorter ones are padded at their ends, which no token before the
end sees. On a GPU, in half precision, torch's variable-length kernel takes all texts in one call (its speed here was
never measured). The naive twin is the padded batch; `isolates` tries both on the model at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.forward.host import Host
from inlay.core.model.view import ModelView
from inlay.core.prompts.interface import (
    MASKS,
    NAMESPACE,
    configurations,
    original_attention,
    put_back,
    registered,
    swapped,
)

NAME = "packed_"
WASTE = 1.25  # texts share a call if it has at most so many slots per token
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class TextRun:
    """Neighbouring texts of equal length: where they begin, how many, how long."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class PaddedRows:
    """Neighbouring texts as rows of equal length, that of the longest text.

    Attributes:
        runs: the texts.
        take: the token in each slot, counted from the first text's first token; padding slots repeat a text's last.
        back: the slot of each token.
        ends: the padding slots.
    """

    runs: tuple[TextRun, ...]
    take: Tensor
    back: Tensor
    ends: Tensor

    @staticmethod
    def of(runs: tuple[TextRun, ...], device: torch.device) -> PaddedRows:
        lengths = torch.tensor([run.length for run in runs for _ in range(run.count)])
        slots = torch.arange(int(lengths.max()))
        inside = slots < lengths[:, None]  # (texts, slots)
        starts = lengths.cumsum(0) - lengths
        take = starts[:, None] + torch.minimum(slots, lengths[:, None] - 1)
        flat = inside.flatten()
        made = (take.flatten(), flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1))
        return PaddedRows(runs, *(t.to(device) for t in made))

    @property
    def texts(self) -> int:
        return sum(run.count for run in self.runs)

    def split(self, packed: Tensor) -> Tensor:
        """(1, heads, tokens, size) → (texts, heads, length, size)."""
        start = self.runs[0].start
        own = packed[0].transpose(0, 1)[start : start + self.back.numel()]  # (tokens, heads, size)
        if self.ends.numel():
            own = TokensToSlots.apply(own, self.take, self.back)  # type: ignore[no-untyped-call]
        rows: Tensor = own.unflatten(0, (self.texts, -1)).transpose(1, 2)
        return rows

    def join(self, apart: Tensor) -> Tensor:
        """(texts, length, heads, size) → (1, tokens, heads, size)."""
        own = apart.flatten(0, 1)
        if self.ends.numel():
            own = SlotsToTokens.apply(own, self.take, self.back, self.ends)  # type: ignore[no-untyped-call]
        return own.unsqueeze(0)


class TokensToSlots(torch.autograd.Function):
    """Tokens to slots. The padding slots are not read by anyone, so no gradient comes back from them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, take: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return tokens.flatten(1).index_select(0, take).view(-1, *tokens.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (back,) = ctx.saved_tensors
        return grads[0].flatten(1).index_select(0, back).view(-1, *grads[0].shape[1:]), None, None


class SlotsToTokens(torch.autograd.Function):
    """Slots back to tokens."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, take: Tensor, back: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(take, ends)
        return slots.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        take, ends = ctx.saved_tensors
        return grads[0].index_select(0, take).index_fill(0, ends, 0), None, None, None


_RUNS: ContextVar[tuple[TextRun, ...] | None] = ContextVar("inlay_packed", default=None)


@contextmanager
def serving(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields the arguments for the model's call, packed or not; must stay open until the backward pass is over."""
    positions = batch.get("position_ids")
    if positions is None:
        yield batch
        return
    with _among(runs_of(positions)):
        yield {name: value for name, value in batch.items() if name != "attention_mask"}


@contextmanager
def _among(runs: tuple[TextRun, ...] | None) -> Iterator[None]:
    token = _RUNS.set(runs)
    try:
        yield
    finally:
        _RUNS.reset(token)


def around(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own forward. A trial may call it with a part of the packed batch, which is not packed then."""
    if torch.compiler.is_compiling():  # under a compiler nothing is packed, and the question cannot be traced
        return inner(*args, **kwargs)
    runs, positions = _RUNS.get(), kwargs.get("position_ids")
    if runs is None or positions is None or sum(r.count * r.length for r in runs) == positions.shape[1]:
        return inner(*args, **kwargs)
    with _among(runs_of(positions)):
        return inner(*args, **kwargs)


def runs_of(positions: Tensor) -> tuple[TextRun, ...]:
    """The texts in packed positions, (1, tokens); a text that was cut may begin at a position other than zero."""
    breaks = (positions[0].diff() != 1).nonzero().squeeze(1) + 1
    starts = [0, *breaks.tolist(), positions.shape[1]]
    texts = [(a, b - a) for a, b in pairwise(starts)]
    grouped = [list(group) for _, group in groupby(texts, key=lambda text: text[1])]
    return tuple(TextRun(group[0][0], len(group), group[0][1]) for group in grouped)


def prepare(model: nn.Module) -> Callable[[], None]:
    """Install the attention that separates texts; the returned function removes it.

    Raises:
        UnsupportedError: the model's attention does not use transformers' interface, or is of an unknown kind.
    """
    view = ModelView(model)
    places = view.attention_places()
    for config in configurations(view, places):
        layers = set(getattr(config, "layer_types", None) or _KNOWN_LAYERS)
        if layers - _KNOWN_LAYERS:
            raise UnsupportedError(f"packing does not know the layer types {', '.join(sorted(layers - _KNOWN_LAYERS))}")
    return partial(put_back, swapped(view, places, _implementation))


def _implementation(original: str) -> str:
    """The registered name of the attention that separates texts in front of `original`."""
    if NAME in original:
        return original
    if original.removeprefix(NAMESPACE) not in ("sdpa", "eager"):  # prompts of other adapters may stand in front of it
        raise UnsupportedError(f"packing works with the attention implementations sdpa and eager, not {original!r}")
    masks = MASKS[original]
    return registered(NAME, original, partial(_attention, original), partial(_mask, masks))


def _mask(masks: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own mask; none if texts are separated."""
    return masks(*args, **kwargs) if _RUNS.get() is None else None


def _attention(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    runs, base = _RUNS.get(), original_attention(original, module)
    if runs is None:
        return base(module, query, key, value, mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise UnsupportedError("attention with a position bias cannot be packed")
    window, needed = kwargs.get("sliding_window"), original.endswith("eager")
    if not needed and _takes_all(query, value, kwargs):
        return at_once(query, key, value, runs, window, kwargs.get("scaling")), None
    parts = []
    for rows in _rows(runs, query.device):
        q, k, v = (rows.split(t) for t in (query, key, value))
        length = q.shape[2]
        own = _causal(length, window, q) if needed or (window and length > window) else None
        parts.append(rows.join(base(module, q, k, v, own, **kwargs)[0]))
    return torch.cat(parts, 1), None


def _takes_all(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the variable-length kernel can compute this."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in ("softcap", "s_aux"))
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def at_once(
    query: Tensor, key: Tensor, value: Tensor, runs: tuple[TextRun, ...], window: int | None, scale: float | None
) -> Tensor:
    """Causal attention within each text, in one call: (1, heads, tokens, size) → (1, tokens, heads, size)."""
    from torch.nn.attention import varlen  # brings the compiler along, which takes a second to import

    starts, longest = _starts(runs, query.device)
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    seen = (-1 if window is None else window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    out = varlen.varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=scale, window_size=seen, enable_gqa=grouped
    )
    assert isinstance(out, Tensor)
    return out[None]


@lru_cache(maxsize=8)
def _starts(runs: tuple[TextRun, ...], device: torch.device) -> tuple[Tensor, int]:
    """Where the texts begin and the last one ends, and the length of the longest; the same for all layers."""
    lengths = [run.length for run in runs for _ in range(run.count)]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths)


@lru_cache(maxsize=8)
def _rows(runs: tuple[TextRun, ...], device: torch.device) -> tuple[PaddedRows, ...]:
    """The texts of a batch divided into calls, as few as `WASTE` allows; the same for all layers."""
    shared: list[list[TextRun]] = []
    for run in runs:
        if shared and _waste([*shared[-1], run]) <= WASTE:
            shared[-1].append(run)
        else:
            shared.append([run])
    return tuple(PaddedRows.of(tuple(some), device) for some in shared)


def _waste(runs: list[TextRun]) -> float:
    """Slots per token if these texts shared a call."""
    return max(r.length for r in runs) * sum(r.count for r in runs) / sum(r.count * r.length for r in runs)


def _causal(length: int, window: int | None, like: Tensor) -> Tensor:
    """An additive causal mask, (1, 1, length, length), limited to `window` tokens back if there is one."""
    at = torch.arange(length, device=like.device)
    back = at[:, None] - at[None, :]
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    added = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return added.masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]


def pack(texts: list[list[int]]) -> dict[str, Tensor]:
    """Texts one after another: ``input_ids``, ``attention_mask`` and ``position_ids``, (1, tokens)."""
    ids = torch.tensor([[token for text in texts for token in text]])
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


def isolates(model: nn.Module, texts: list[list[int]], tolerance: float) -> bool:
    """Whether packed texts have the same logits as alone, and no text changes when another one does.

    Args:
        texts: at least two, each of at least two tokens.
        tolerance: relative difference allowed between packed and alone; the effect of a text on others must be zero.
    """
    device = next(model.parameters()).device

    def scores(batch: dict[str, Tensor]) -> Tensor:
        with serving({name: value.to(device) for name, value in batch.items()}) as given:
            out: Tensor = model(**given, use_cache=False).logits[0]
        return out + 0

    try:
        packed = scores(pack(texts))
        moved = scores(pack([texts[0][::-1], *texts[1:]]))
        alone = torch.cat([scores({"input_ids": torch.tensor([text])}) for text in texts])
    except (RuntimeError, AttributeError, TypeError, IndexError, ValueError):
        return False
    first = len(texts[0])
    apart = (packed - alone).float().norm(dim=-1) <= tolerance * alone.float().norm(dim=-1)
    return bool(apart.all()) and torch.equal(packed[first:], moved[first:])
