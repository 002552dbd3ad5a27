"""Several texts in one sequence, each as if it were alone.

    padded   a a a · ·        packed   a a a b b c c c c c        positions   0 1 2 0 1 0 1 2 3 4
             b b · · ·                 └─┬─┘ └┬┘ └───┬───┘
             c c c c c                 attention a text at a time, without a mask

Everything but attention sees tokens one by one, so packing is exact where attention is: a registered attention
function takes each text's queries, keys and values by themselves and gives them to the model's own implementation,
and no mask is ever made: texts of like length share a call, the shorter ones filled up at their ends, which nothing
before an end sees. On a GPU, in half precision, torch's variable-length kernel takes all texts in one call (its speed
here was never measured). The naive twin is the padded batch; `isolates` tries both on the model at hand.
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
from torch.nn.attention import varlen

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
WASTE = 1.25  # slots to tokens, at most, of texts that share a call
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Run:
    """Neighbouring texts of one length: where they begin, how many, how long."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Rows:
    """Neighbouring texts as rows of one length, that of the longest.

    Attributes:
        runs: the texts.
        take: the token of each slot, counted from the first text's first; a slot behind a text's end holds its last.
        back: the slot of each token.
        ends: the slots behind texts' ends.
    """

    runs: tuple[Run, ...]
    take: Tensor
    back: Tensor
    ends: Tensor

    @staticmethod
    def of(runs: tuple[Run, ...], device: torch.device) -> Rows:
        lengths = torch.tensor([run.length for run in runs for _ in range(run.count)])
        slots = torch.arange(int(lengths.max()))
        inside = slots < lengths[:, None]  # (texts, slots)
        starts = lengths.cumsum(0) - lengths
        take = starts[:, None] + torch.minimum(slots, lengths[:, None] - 1)
        flat = inside.flatten()
        made = (take.flatten(), flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1))
        return Rows(runs, *(t.to(device) for t in made))

    @property
    def texts(self) -> int:
        return sum(run.count for run in self.runs)

    def apart(self, packed: Tensor) -> Tensor:
        """(1, heads, tokens, size) → (texts, heads, length, size)."""
        start = self.runs[0].start
        own = packed[0].transpose(0, 1)[start : start + self.back.numel()]  # (tokens, heads, size)
        if self.ends.numel():
            own = Filled.apply(own, self.take, self.back)  # type: ignore[no-untyped-call]
        rows: Tensor = own.unflatten(0, (self.texts, -1)).transpose(1, 2)
        return rows

    def together(self, apart: Tensor) -> Tensor:
        """(texts, length, heads, size) → (1, tokens, heads, size)."""
        own = apart.flatten(0, 1)
        if self.ends.numel():
            own = Cut.apply(own, self.take, self.back, self.ends)  # type: ignore[no-untyped-call]
        return own.unsqueeze(0)


class Filled(torch.autograd.Function):
    """Tokens in slots. Nobody reads what slots behind an end become, so no gradient comes back from there."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, take: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return tokens.flatten(1).index_select(0, take).view(-1, *tokens.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (back,) = ctx.saved_tensors
        return grads[0].flatten(1).index_select(0, back).view(-1, *grads[0].shape[1:]), None, None


class Cut(torch.autograd.Function):
    """Slots back to tokens."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, take: Tensor, back: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(take, ends)
        return slots.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        take, ends = ctx.saved_tensors
        return grads[0].index_select(0, take).index_fill(0, ends, 0), None, None, None


_RUNS: ContextVar[tuple[Run, ...] | None] = ContextVar("inlay_packed", default=None)


@contextmanager
def serving(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """What to call the model with for a batch, packed or not; the block must last until its backward pass is over."""
    positions = batch.get("position_ids")
    if positions is None:
        yield batch
        return
    with _among(runs_of(positions)):
        yield {name: value for name, value in batch.items() if name != "attention_mask"}


@contextmanager
def _among(runs: tuple[Run, ...] | None) -> Iterator[None]:
    token = _RUNS.set(runs)
    try:
        yield
    finally:
        _RUNS.reset(token)


def around(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own forward, called with a part of the packed batch by who only tries something."""
    if torch.compiler.is_compiling():  # nothing is packed then, and a graph cannot ask
        return inner(*args, **kwargs)
    runs, positions = _RUNS.get(), kwargs.get("position_ids")
    if runs is None or positions is None or sum(r.count * r.length for r in runs) == positions.shape[1]:
        return inner(*args, **kwargs)
    with _among(runs_of(positions)):
        return inner(*args, **kwargs)


def runs_of(positions: Tensor) -> tuple[Run, ...]:
    """The texts in packed positions, (1, tokens); one may begin at another position than zero, where it was cut."""
    breaks = (positions[0].diff() != 1).nonzero().squeeze(1) + 1
    starts = [0, *breaks.tolist(), positions.shape[1]]
    texts = [(a, b - a) for a, b in pairwise(starts)]
    grouped = [list(group) for _, group in groupby(texts, key=lambda text: text[1])]
    return tuple(Run(group[0][0], len(group), group[0][1]) for group in grouped)


def prepare(model: nn.Module) -> Callable[[], None]:
    """Give a model the attention that takes texts apart; the function returned takes it back.

    Raises:
        UnsupportedError: attention outside of transformers' interface, or of a kind that is not known here.
    """
    view = ModelView(model)
    places = view.attention_places()
    for config in configurations(view, places):
        layers = set(getattr(config, "layer_types", None) or _KNOWN_LAYERS)
        if layers - _KNOWN_LAYERS:
            raise UnsupportedError(f"packing does not know the layers {', '.join(sorted(layers - _KNOWN_LAYERS))}")
    return partial(put_back, swapped(view, places, _implementation))


def _implementation(original: str) -> str:
    """The registered name of the attention that takes texts apart before `original`."""
    if NAME in original:
        return original
    if original.removeprefix(NAMESPACE) not in ("sdpa", "eager"):  # prompts of other adapters stand before it
        raise UnsupportedError(f"packing works with the attention implementations sdpa and eager, not {original!r}")
    masks = MASKS[original]
    return registered(NAME, original, partial(_attention, original), partial(_mask, masks))


def _mask(masks: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own mask; none where texts are taken apart."""
    return masks(*args, **kwargs) if _RUNS.get() is None else None


def _attention(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    runs, base = _RUNS.get(), original_attention(original, module)
    if runs is None:
        return base(module, query, key, value, mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise UnsupportedError("attention with a bias by position cannot be packed")
    window, needed = kwargs.get("sliding_window"), original.endswith("eager")
    if not needed and _takes_all(query, value, kwargs):
        return at_once(query, key, value, runs, window, kwargs.get("scaling")), None
    parts = []
    for rows in _rows(runs, query.device):
        q, k, v = (rows.apart(t) for t in (query, key, value))
        length = q.shape[2]
        own = _causal(length, window, q) if needed or (window and length > window) else None
        parts.append(rows.together(base(module, q, k, v, own, **kwargs)[0]))
    return torch.cat(parts, 1), None


def _takes_all(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the variable-length kernel computes this."""
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
    query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], window: int | None, scale: float | None
) -> Tensor:
    """Causal attention of every text to itself, in one call: (1, heads, tokens, size) → (1, tokens, heads, size)."""
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
def _starts(runs: tuple[Run, ...], device: torch.device) -> tuple[Tensor, int]:
    """Where the texts begin and the last one ends, for all layers of a batch; and the longest text."""
    lengths = [run.length for run in runs for _ in range(run.count)]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths)


@lru_cache(maxsize=8)
def _rows(runs: tuple[Run, ...], device: torch.device) -> tuple[Rows, ...]:
    """The calls that a batch's texts take, for all its layers: as few as waste allows."""
    shared: list[list[Run]] = []
    for run in runs:
        if shared and _waste([*shared[-1], run]) <= WASTE:
            shared[-1].append(run)
        else:
            shared.append([run])
    return tuple(Rows.of(tuple(some), device) for some in shared)


def _waste(runs: list[Run]) -> float:
    """Slots to tokens, were these texts one call's."""
    return max(r.length for r in runs) * sum(r.count for r in runs) / sum(r.count * r.length for r in runs)


def _causal(length: int, window: int | None, like: Tensor) -> Tensor:
    """A causal mask to add, (1, 1, length, length), that ends `window` tokens back where there is one."""
    at = torch.arange(length, device=like.device)
    back = at[:, None] - at[None, :]
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    added = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return added.masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]


def pack(texts: list[list[int]]) -> dict[str, Tensor]:
    """Texts behind one another: ``input_ids``, ``attention_mask`` and ``position_ids``, (1, tokens)."""
    ids = torch.tensor([[token for text in texts for token in text]])
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


def isolates(model: nn.Module, texts: list[list[int]], tolerance: float) -> bool:
    """Whether packed texts have the scores they have alone, and none of them changes when another does.

    Args:
        texts: two at least, each of two tokens at least.
        tolerance: between packed and alone, relative; what a text does to another is measured bit for bit.
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
