"""Where each row's prompt lies in a forward, for deltas that act at some of its positions only (LoReFT) or, beside an
encoder, look at the row's other tokens (side attention).

In training the prompt ends where the labels of a model that writes begin (tags of tokens hide none of them); where
they begin at the first token, without labels, and for encoders, it is the row without its padding. Of an
encoder–decoder it is what the encoder reads. A forward that continues a cache (a step of generation) holds none of
it; generation without a cache knows how long it was. A model that reads no tokens (pixels) has its whole rows for
prompts: ends beyond a row are cut by who reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.core.errors import UnsupportedError
from inlay.core.labels import IGNORED
from inlay.core.model.site import Site

if TYPE_CHECKING:
    from inlay.core.forward.host import Host

FAR = 2**31


def span_of(given: dict[str, Any], rows: int, tokens: int, prompt: int | None = None) -> Tensor:
    """First token of each row's prompt and the one behind its last, (rows, 2).

    Args:
        given: the model's keyword arguments.
        rows, tokens: of the batch.
        prompt: tokens that generation started from.

    Raises:
        UnsupportedError: the mask is not one a row and token.
    """
    mask, labels, cache = given.get("attention_mask"), given.get("labels"), given.get("past_key_values")
    past = cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0
    device = next((v.device for v in given.values() if isinstance(v, Tensor)), None)
    if past:
        return torch.zeros(rows, 2, dtype=torch.long, device=device)
    first = torch.zeros(rows, dtype=torch.long, device=device)
    behind = torch.full((rows,), tokens, dtype=torch.long, device=device)
    if all(given.get(n) is None for n in ("input_ids", "inputs_embeds")):
        return torch.stack([first, torch.full_like(first, FAR)], 1)
    if mask is not None:
        if mask.dim() != 2 or mask.shape[1] != tokens:
            raise UnsupportedError("positions of a prompt need an attention mask of shape (rows, tokens)")
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
    """The span in force at a delta's site, one entry a row that `post` was given.

    Raises:
        UnsupportedError: the layer was called outside its model.
    """
    host: Host | None = site.module.__dict__.get("_inlay_host")
    call = host.roster.call.get() if host is not None else None
    if call is None or call.span is None:
        raise UnsupportedError(f"{site.path} was called outside its model, so the prompt's positions are not known")
    return call.span
