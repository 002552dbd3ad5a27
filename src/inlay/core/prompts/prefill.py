"""The prompts of a call: for every adapter on its route, computed, or cached by an earlier forward.

key/value prompts   stand one after another at each attention module
token prompts       in an encoder: join its sequence (`core/prompts/encoder_sequence.py`); in a decoder: are run through
                    the model, one row, and the keys and values of every attention module are kept
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.contracts.prompt import KeyValues, TokenPrompt
from inlay.core.errors import UnsupportedError
from inlay.core.forward.active_adapters import Roster
from inlay.core.forward.call import Call
from inlay.core.forward.route import Route
from inlay.core.forward.transforms import transformed
from inlay.core.forward.wrappers import enabled
from inlay.core.model.view import ModelView
from inlay.core.upstream import autocasts_anywhere


def prepare(roster: Roster, route: Route) -> Call:
    """Compute the prompts of every adapter on the route, or take those in the cache if nothing has changed."""
    call = Call(route)
    prefilled: frozenset[str] = frozenset()
    keeps = keepable() and not autocasts_anywhere()  # under autocast they have other values
    for name in route.used:
        if not roster.has_prompt(name):
            continue
        own = roster.kept.prompts(name) if keeps else None
        if own is None:
            own = _computed(roster, name)
            if keeps:
                roster.kept.keep(name, own, roster.require(name).modules(), ModelView(roster.model).modules.values())
        call.prefixes.update(own.prefixes)
        call.gated.update(own.gated)
        call.shifts.update(own.shifts)
        call.sequences.update(own.sequences)
        prefilled |= own.prefilled
    return replace(call, prefilled=prefilled)


def _computed(roster: Roster, name: str) -> Call:
    """The prompts of one adapter, as a call."""
    call = Call(Route((name,)))
    pairs: list[KeyValues] = []
    gated: list[KeyValues] = []
    tokens: list[Tensor] = []
    for piece in roster.require(name).prompts:
        prompt = piece.prompt
        if isinstance(prompt, TokenPrompt) and roster.encoder:
            before = [call.sequences[name]] if name in call.sequences else []
            call.sequences[name] = torch.cat([*before, prompt.embeddings()])
            continue
        if isinstance(prompt, TokenPrompt):
            tokens.append(prompt.embeddings())
            continue
        (gated if prompt.gated else pairs).append(prompt.keys_values())
        if not prompt.gated:
            call.shifts[name] = call.shifts.get(name, 0) + prompt.length
    if len(gated) > 1:
        raise UnsupportedError(f"adapter {name!r} has several gated prompts; attach them as adapters of their own")
    if gated:
        call.gated[name] = gated[0]
    if pairs:
        call.prefixes[name] = _joined(pairs)
    if not tokens:
        return call
    embeddings = torch.cat(tokens)  # they see the key/value pairs, as they do in an encoder's sequence
    pairs.append(_prefill(roster, name, embeddings, call))
    call.prefixes[name] = _joined(pairs)
    call.shifts[name] = call.shifts.get(name, 0) + embeddings.shape[0]
    return replace(call, prefilled=frozenset({name}))


def _joined(pairs: list[KeyValues]) -> KeyValues:
    """Several prompts of one adapter, one after another."""
    if len(pairs) == 1:
        return pairs[0]
    found: KeyValues = {}
    for path in dict.fromkeys(p for kv in pairs for p in kv):
        held = [kv[path] for kv in pairs if path in kv]
        found[path] = tuple(torch.cat([h[i] for h in held], dim=1) for i in (0, 1))
        weights = next((h[2] for h in held if len(h) == 4), None)
        if weights is not None:  # pairs that are not weighed count fully: σ(∞) = 1
            size = weights.shape[1]
            each = [h if len(h) == 4 else _whole(h[0].shape[1], size, weights) for h in held]
            found[path] += tuple(torch.cat([h[i] for h in each]) for i in (-2, -1))
    return found


def _whole(length: int, hidden: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_zeros(length, hidden), like.new_full((length,), float("inf"))


def _prefill(roster: Roster, name: str, embeddings: Tensor, prompts: Call) -> KeyValues:
    """Run virtual tokens (length, hidden) through the model with their own adapter; returns their keys and values."""
    model: Any = roster.model
    base = getattr(model, "base_model", model)
    if embeddings.requires_grad and _sharded(model):
        raise UnsupportedError(
            "a token prompt on a sharded decoder cannot be trained: FSDP frees the layers that its keys and values "
            "came from before their gradients are known; use prefix-tuning, or data parallelism without sharding"
        )
    weight = next(iter(model.get_input_embeddings()._parameters.values()))
    captured: KeyValues = {}
    route = Route((name,))
    nowhere = torch.zeros(1, 2, dtype=torch.long, device=embeddings.device)  # virtual tokens are not a prompt's text
    with roster.bind(route, replace(prompts, route=route, capture=captured, span=nowhere)):
        base(inputs_embeds=embeddings.to(weight.dtype)[None], use_cache=False)
    if not captured:
        raise UnsupportedError(f"no attention module of {type(model).__name__} passed through the attention interface")
    return captured


def _sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages some layer; does not import FSDP to find out."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules())


def stackable() -> bool:
    """Whether mixed rows may be computed at once: not if gradients flow or a graph is traced."""
    return _plain() and enabled("grouped-rows")


def keepable() -> bool:
    """Whether prompts may be put into the cache, or taken from it."""
    return _plain() and enabled("kept-prompts")


def _plain() -> bool:
    return not torch.is_grad_enabled() and not transformed()
