"""An encoder's sequence with virtual tokens: how it is put together, and how the text is taken out of it again.

    order is None      block | text                        the block is as long as the batch's longest prompt
    order              padding | block | text              if some row's text begins behind padding

A row's own prompt stands at the right end of the block, next to its text; the slots in front of a shorter one are
masked. `order` gives, for each place of the sequence, its index in (block, text): (rows, block + tokens).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.forward.call import Call


def enter(call: Call, given: dict[str, Any], embeds: Tensor) -> tuple[Call, dict[str, Any]]:
    """The inputs of an encoder with the virtual block in front of the text, and a call that knows their order.

    Args:
        given: the encoder's keyword arguments. A mask longer than the text already covers the block.
        embeds: the text's embeddings (rows, tokens, hidden).

    Raises:
        UnsupportedError: the mask is not two-dimensional: it says who sees whom, not which tokens are padding.
    """
    rows, length = embeds.shape[:2]
    mask = given.get("attention_mask")
    if mask is None:
        mask = embeds.new_ones((rows, length), dtype=torch.long)
    if mask.dim() != 2:
        raise UnsupportedError("a token prompt needs a two-dimensional attention mask (rows, tokens)")
    if mask.shape[1] == length:
        call = arranged(call, mask)
        mask = joined(call, valid(call, mask), mask)
    inputs = {**given, "input_ids": None, "attention_mask": mask}
    for name, ahead in (("token_type_ids", 0), ("position_ids", call.block)):
        if given.get(name) is not None:
            text = given[name].expand(rows, length)
            virtual = torch.arange(call.block, device=text.device) if ahead else text.new_zeros(call.block)
            inputs[name] = joined(call, virtual.expand(rows, call.block), text + ahead)
    return call, {**inputs, "inputs_embeds": joined(call, block_of(call, embeds), embeds)}


def valid(call: Call, mask: Tensor) -> Tensor:
    """The mask of the virtual block, (rows, block): ones for a row's own prompt, at the right end."""
    block = call.block
    lengths = [call.sequences[n].shape[0] if n in call.sequences else 0 for n in call.route.names_for(mask.shape[0])]
    slots = torch.arange(block, device=mask.device)[None, :]
    first = block - torch.tensor(lengths, device=mask.device)[:, None]
    return (slots >= first).to(mask.dtype)


def block_of(call: Call, embeds: Tensor) -> Tensor:
    """The virtual block itself, (rows, block, hidden); unused slots are zero and masked."""
    block, names = call.block, call.route.names_for(embeds.shape[0])
    padded = {
        n: nn.functional.pad(s.to(embeds.dtype), (0, 0, block - s.shape[0], 0)) for n, s in call.sequences.items()
    }
    empty = embeds.new_zeros((block, embeds.shape[2]))
    return torch.stack([padded.get(n, empty) if n is not None else empty for n in names])


def padding_ahead(mask: Tensor) -> Tensor:
    """The number of masked tokens at the start of each row, (rows)."""
    return (mask.cumsum(1) == 0).sum(1)


def arranged(call: Call, mask: Tensor) -> Call:
    """The call with the order of an encoder's sequence, if some row's text begins behind padding.

    A prompt stands directly in front of its text, so that distances are the same as for the row alone: padding first,
    then the virtual block, then the text.
    """
    ahead, block = padding_ahead(mask)[:, None], call.block
    if not torch.compiler.is_compiling() and not bool(ahead.any()):
        return replace(call, order=None)
    slots = torch.arange(block + mask.shape[1], device=mask.device)[None, :]
    order = torch.where(slots < ahead, slots + block, torch.where(slots < ahead + block, slots - ahead, slots))
    return replace(call, order=order)


def joined(call: Call, virtual: Tensor, text: Tensor) -> Tensor:
    """Block and text concatenated along the tokens, in the call's order."""
    whole = torch.cat([virtual.to(text.dtype), text], dim=1)
    return whole if call.order is None else _taken(whole, call.order)


def text_of(call: Call, whole: Tensor) -> Tensor:
    """The text's entries of an encoder's output, in the order of the input."""
    if call.order is None:
        return whole[:, call.block :]
    return _taken(whole, call.order.argsort(1)[:, call.block :])


def _taken(values: Tensor, order: Tensor) -> Tensor:
    """Tokens in another order, which may differ from row to row."""
    index = order if values.dim() == 2 else order[..., None].expand(*order.shape, values.shape[2])
    return values.gather(1, index)


def cut(out: Any, call: Call) -> None:
    """Remove the virtual positions from an encoder's outputs, in place."""
    out.last_hidden_state = text_of(call, out.last_hidden_state)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(text_of(call, h) for h in out.hidden_states)
    if getattr(out, "attentions", None) is not None:
        if call.order is not None:
            raise UnsupportedError("attention weights behind a prompt need padding on the right")
        out.attentions = tuple(None if a is None else a[..., call.block :, call.block :] for a in out.attentions)
