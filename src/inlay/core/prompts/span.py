"""Where each row's prompt lies in a forward, for deltas that act at some of its positions only (LoReFT) or, beside an
encoder, look at the row's other tokens (side attention).

In training of a model that writes text, the prompt ends where the labels begin. If they begin at the first token, if
there are none, and in encoders (where labels may be tags of the tokens), the prompt is the row without its padding. In
an encoder–decoder it is what the encoder reads. A forward that continues a cache (a step of generation) contains no
part of it; generation without a cache remembers how long it was. In a model that reads no tokens (pixels) the prompt is
the whole row; its end may lie beyond the row, and whoever reads it cuts it off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.core.errors import UnsupportedError
from inlay.core.forward.call import cache_among
from inlay.core.labels import IGNORED
from inlay.core.model.site import Site

if TYPE_CHECKING:
    from inlay.core.forward.host import Host

FAR = 2**31


def span_of(given: dict[str, Any], rows: int, tokens: int, prompt: int | None = None) -> Tensor:
    """The first token of each row's prompt and the one after its last, (rows, 2).

    Args:
        given: the model's keyword arguments.
        rows, tokens: sizes of the batch.
        prompt: number of tokens that generation started from.

    Raises:
        UnsupportedError: the mask is not of shape (rows, tokens).
    """
    mask, labels, cache = given.get("attention_mask"), given.get("labels"), cache_among(given.values())
    past = 0 if cache is None else cache.get_seq_length()
    device = next((v.device for v in given.values() if isinstance(v, Tensor)), None)
    if past:
        return torch.zeros(rows, 2, dtype=torch.long, device=device)
    first = torch.zeros(rows, dtype=torch.long, device=device)
    behind = torch.full((rows,), tokens, dtype=torch.long, device=device)
    if all(given.get(n) is None for n in ("input_ids", "inputs_embeds")):
        return torch.stack([first, torch.full_like(first, FAR)], 1)
    if mask is not None:
        if mask.dim() != 2 or mask.shape[1] != tokens:
            raise UnsupportedError("finding a prompt's positions needs an attention mask of shape (rows, tokens)")
        real = mask != 0
        first = (real.cumsum(1) == 0).sum(1)
        behind = tokens - (real.flip(1).cumsum(1) == 0).sum(1)
    if labels is not None and labels.shape == (rows, tokens):
        until = ((labels != IGNORED).cumsum(1) == 0).sum(1)
        behind = torch.where(until > first, torch.minimum(behind, until), behind)
    if prompt is not None:
        behind = behind.clamp(max=prompt)
    return torch.stack([first, behind.clamp(min=0)], 1)


def current_span(site: Site) -> Tensor:
    """The span at a delta's site, with one entry for each row that `post` gets.

    Raises:
        UnsupportedError: the layer was called outside its model.
    """
    host: Host | None = site.module.__dict__.get("_inlay_host")
    call = host.roster.call.get() if host is not None else None
    if call is None or call.span is None:
        raise UnsupportedError(f"{site.path} was called outside its model, so the prompt's positions are not known")
    return call.span
