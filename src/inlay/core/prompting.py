"""How virtual positions enter a model and never show.

    decoder            a token prompt is run through the model once a call (one row, however many rows the
                       batch has) and its keys and values stand in front of every row's own: exact, because
                       nothing after the prompt can change it. The text's positions move on by its length.
    encoder            a token prompt joins the sequence: embeddings, mask and token types grow on the left, the
                       outputs are cut back. Rows with shorter prompts, or none, have masked slots there.
    key/value prompt   stands in front of the text's own keys and values at its attention modules.

The functions here wrap the forwards of special modules (`core/adapted.py` says which).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.call import Call
from inlay.core.errors import UnsupportedError
from inlay.core.host import Host, thread
from inlay.core.prompt import KeyValues, TokenPrompt
from inlay.core.roster import Roster
from inlay.core.route import Route
from inlay.core.span import span_of
from inlay.core.view import ModelView

Forward = Callable[..., Any]
INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids", "inputs", "attention_mask", "input_values")


def prepare(roster: Roster, route: Route) -> Call:
    """Compute the prompts of every adapter on the route, or take those of the last time where nothing has changed."""
    call = Call(route)
    prefilled: frozenset[str] = frozenset()
    for name in route.used:
        if not roster.has_prompt(name):
            continue
        own = roster.kept.prompts(name) if _stackable() else None
        if own is None:
            own = _computed(roster, name)
            if _stackable():
                roster.kept.keep(name, own, roster.require(name).modules(), ModelView(roster.model).modules.values())
        call.prefixes.update(own.prefixes)
        call.gated.update(own.gated)
        call.shifts.update(own.shifts)
        call.sequences.update(own.sequences)
        prefilled |= own.prefilled
    return replace(call, prefilled=prefilled)


def _computed(roster: Roster, name: str) -> Call:
    """The prompts of one adapter, as a call of its own."""
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
    embeddings = torch.cat(tokens)  # they see the key/value pairs, as they do where they join an encoder's sequence
    pairs.append(_prefill(roster, name, embeddings, call))
    call.prefixes[name] = _joined(pairs)
    call.shifts[name] = call.shifts.get(name, 0) + embeddings.shape[0]
    return replace(call, prefilled=frozenset({name}))


def _joined(pairs: list[KeyValues]) -> KeyValues:
    """Several prompts of one adapter behind one another."""
    if len(pairs) == 1:
        return pairs[0]
    found: KeyValues = {}
    for path in dict.fromkeys(p for kv in pairs for p in kv):
        held = [kv[path] for kv in pairs if path in kv]
        found[path] = tuple(torch.cat([h[i] for h in held], dim=1) for i in (0, 1))
        weights = next((h[2] for h in held if len(h) == 4), None)
        if weights is not None:  # pairs that are not weighed count whole, σ(∞) = 1
            size = weights.shape[1]
            each = [h if len(h) == 4 else _whole(h[0].shape[1], size, weights) for h in held]
            found[path] += tuple(torch.cat([h[i] for h in each]) for i in (-2, -1))
    return found


def _whole(length: int, hidden: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_zeros(length, hidden), like.new_full((length,), float("inf"))


def _prefill(roster: Roster, name: str, embeddings: Tensor, prompts: Call) -> KeyValues:
    """Run virtual tokens (length, hidden) through the model under their own adapter and keep what attention saw."""
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
    nowhere = torch.zeros(1, 2, dtype=torch.long, device=embeddings.device)  # virtual tokens are no prompt's text
    with roster.bind(route, replace(prompts, route=route, capture=captured, span=nowhere)):
        base(inputs_embeds=embeddings.to(weight.dtype)[None], use_cache=False)
    if not captured:
        raise UnsupportedError(f"no attention module of {type(model).__name__} passed through the attention interface")
    return captured


def _sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages some layer; its module is not imported for the answer."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules())


# -- wrappers ---------------------------------------------------------------------------------------


def root(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """The model's own forward: check rows, compute prompts, hide what they left in the outputs."""
    roster = host.roster
    route, call = roster.current(), roster.call.get()
    for around in AROUND:
        inner = partial(around, host, inner)
    if roster.merged is not None:
        roster.check_merged(route)
        return inner(*args, **kwargs)
    rows, tokens = _shape(args, kwargs)
    if rows is not None:
        route.check_rows(rows)
    if call is not None and (call.capture is not None or call.rows is not None):
        return inner(*args, **kwargs)  # a prompt's own run, or a forward around the model's own
    if call is None:
        prompted = any(roster.has_prompt(n) for n in route.used)
        if route.single and not prompted and not _reads_span(roster, route):
            return inner(*args, **kwargs)
        call = prepare(roster, route) if prompted else Call(route)
    given = {**dict(zip(_names(host), args, strict=False)), **kwargs}
    stacks = None if route.single or not _stackable() else roster.kept.of(route)
    call = replace(call, rows=rows, tokens=tokens, padding=_padding(call, given), stacks=stacks)
    if rows is not None and tokens is not None and not _encoder_decoder(roster) and _reads_span(roster, route):
        call = replace(call, span=span_of(given, rows, tokens, call.prompt))
    if not (call.block and _encoder_decoder(roster)):
        with roster.bind(route, call):
            return inner(*args, **kwargs)
    return _seq2seq(roster, inner, call, given)


def _padding(call: Call, given: dict[str, Any]) -> Tensor | None:
    """Masked tokens in front of each row's text, which a prompt must not be moved away by."""
    mask = given.get("attention_mask")
    if not call.shifts or given.get("position_ids") is not None or mask is None or mask.dim() != 2:
        return None
    return _leading(mask)


def _leading(mask: Tensor) -> Tensor:
    """How many masked tokens each row begins with, (rows)."""
    return (mask.cumsum(1) == 0).sum(1)


def _seq2seq(roster: Roster, inner: Forward, call: Call, given: dict[str, Any]) -> Any:
    """An encoder–decoder with virtual tokens in its encoder: the decoder must see them in the mask."""
    mask, block = given.get("attention_mask"), call.block
    encoded = given.get("encoder_outputs")
    source = encoded[0] if encoded is not None else _present(given, "input_ids", "inputs_embeds")
    length = source.shape[1] - (block if encoded is not None else 0)
    if mask is None:
        mask = source.new_ones((source.shape[0], length), dtype=torch.long)
    call = _arranged(call, mask)
    given["attention_mask"] = _joined_rows(call, _valid(call, mask), mask)
    as_tuple = given.get("return_dict") is False
    with roster.bind(call.route, call):
        out = inner(**{**given, "return_dict": True})
    if encoded is None and getattr(out, "encoder_last_hidden_state", None) is not None:
        out.encoder_last_hidden_state = _text(call, out.encoder_last_hidden_state)
    if encoded is None and getattr(out, "encoder_hidden_states", None) is not None:
        out.encoder_hidden_states = tuple(_text(call, h) for h in out.encoder_hidden_states)
    return out.to_tuple() if as_tuple else out


def stack(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """An encoder that virtual tokens join."""
    roster = host.roster
    call = roster.call.get()
    if call is None and any(roster.has_prompt(n) for n in roster.current().used):
        call = prepare(roster, roster.current())
    if call is None or not call.sequences:
        return inner(*args, **kwargs)
    given = {**dict(zip(_names(host), args, strict=False)), **kwargs}
    block, module = call.block, host.module
    embeds = given.get("inputs_embeds")
    if embeds is None:
        embeds = module.get_input_embeddings()(given["input_ids"])  # type: ignore[operator]
    rows, length = embeds.shape[:2]
    if call.span is not None:
        raise UnsupportedError("virtual tokens in an encoder move the positions at which another delta acts")
    call = replace(call, rows=rows)
    mask = given.get("attention_mask")
    if mask is None:
        mask = embeds.new_ones((rows, length), dtype=torch.long)
    if mask.dim() != 2:
        raise UnsupportedError("a token prompt needs a two-dimensional attention mask (rows, tokens)")
    if mask.shape[1] == length:
        call = _arranged(call, mask)
        mask = _joined_rows(call, _valid(call, mask), mask)
    for name, ahead in (("token_type_ids", 0), ("position_ids", block)):
        if given.get(name) is not None:
            text = given[name].expand(rows, length)
            virtual = torch.arange(block, device=text.device) if ahead else text.new_zeros(block)
            given[name] = _joined_rows(call, virtual.expand(rows, block), text + ahead)
    whole = _joined_rows(call, _block(call, embeds), embeds)
    given |= {"input_ids": None, "inputs_embeds": whole, "attention_mask": mask}
    as_tuple = given.pop("return_dict", None) is False
    with roster.bind(call.route, call):
        out = inner(**given)
    if not _encoder_decoder(roster):
        _cut(out, call)
    return out.to_tuple() if as_tuple else out


def source(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """The encoder of an encoder–decoder, which generation calls by itself: what it reads is the prompt."""
    roster = host.roster
    call = roster.call.get() or Call(roster.current())
    rows, tokens = _shape(args, kwargs)
    if rows is None or tokens is None or roster.merged is not None or not _reads_span(roster, call.route):
        return inner(*args, **kwargs)
    given = {**dict(zip(_names(host), args, strict=False)), **kwargs}
    with roster.bind(call.route, replace(call, span=span_of(given, rows, tokens))):
        return inner(*args, **kwargs)


def pooler(host: Host, inner: Forward, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The pooler reads the first token: the text's, not the prompt's."""
    call = host.roster.call.get()
    return inner(hidden if call is None or not call.block else _text(call, hidden), *args, **kwargs)


def weighing(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """Attention whose pairs are weighed by what enters it, which the attention function does not see."""
    call = host.roster.call.get()
    if call is None or not any(len(call.prefixes.get(n, {}).get(host.path, ())) == 4 for n in call.route.used):
        return inner(*args, **kwargs)
    host.entered[thread()] = args[0] if args else kwargs["hidden_states"]
    try:
        return inner(*args, **kwargs)
    finally:
        host.entered.pop(thread(), None)


def rotary(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """Rotary positions count a prompt's positions too."""
    if "position_ids" in kwargs:
        return inner(*args, **{**kwargs, "position_ids": shift(host, kwargs["position_ids"], relative=True)})
    return inner(args[0], shift(host, args[1], relative=True), *args[2:], **kwargs)


# What stands around the model's own forward inside `root`: fast paths put themselves here (`inlay.kernels`).
AROUND: list[Callable[..., Any]] = []
# Feature of `WRAPPERS` → which modules of an attached model get it, for fast paths of the base's own modules.
RECOGNISED: dict[str, Callable[[nn.Module], bool]] = {}
# Innermost first: a module may be root and stack at once.
WRAPPERS: dict[str, Callable[..., Any]] = {
    "rotary": rotary, "weighing": weighing, "pooler": pooler, "stack": stack, "source": source, "root": root,
}  # fmt: skip


def shift(host: Host, positions: Tensor, *, relative: bool = False) -> Tensor:
    """Positions of the text behind each row's prompt.

    In a decoder the text begins behind the prompt. In an encoder the sequence holds the longest prompt's
    slots for all rows, so rows with shorter prompts move back. Where only differences of positions count
    (`relative`), padding in front of a row does not come between it and its prompt.
    """
    call = host.roster.call.get()
    if relative and call is not None and call.padding is not None and not host.encoder:
        positions = (positions - call.padding[:, None]).clamp(min=0)
    if call is None:
        return positions
    if host.encoder and not call.sequences:
        return positions
    if host.encoder:
        by = {n: call.sequences[n].shape[0] if n in call.sequences else 0 for n in call.route.names if n is not None}
        offset = -call.block
    else:
        by, offset = call.shifts, 0
    if call.route.single:
        moved = by.get(call.route.names[0] or "", 0) + offset
        return positions if moved == 0 else (positions + moved).clamp(min=0)
    moves = [(by.get(n, 0) if n is not None else 0) + offset for n in call.route.names_for(call.rows or 0)]
    if not any(moves):
        return positions
    column = torch.tensor(moves, device=positions.device)[:, None]
    return (positions + column).clamp(min=0)


@contextmanager
def generation(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Everything `generate` does happens under one route, with the prompts computed once."""
    roster = host.roster
    route = roster.current()
    prompted = roster.merged is None and any(roster.has_prompt(n) for n in route.used)
    if not route.per_row and not prompted and not _reads_span(roster, route):
        yield
        return
    rows, tokens = _shape(args, kwargs)
    if rows is not None:
        replace(route, expand=1).check_rows(rows)
    route = replace(route, expand=_copies(host.module, kwargs))
    with torch.no_grad(), roster.bind(route, replace(prepare(roster, route), prompt=tokens)):
        yield


def _copies(model: Any, kwargs: dict[str, Any]) -> int:
    """How many rows generation makes of each: its beams, or its samples."""
    config = kwargs.get("generation_config") or model.generation_config
    values = [kwargs.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences")]
    return max(values)


def _reads_span(roster: Roster, route: Route) -> bool:
    return any(roster.reads_span(n) for n in route.used)


def _stackable() -> bool:
    """Whether mixed rows may be computed at once: not where a gradient flows or a graph is traced."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


# -- small parts ------------------------------------------------------------------------------------


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, int | None]:
    """Rows and tokens of a batch: the leading dimensions of the first tensor among its inputs."""
    for value in (*args, *(kwargs.get(n) for n in INPUTS), *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0], value.shape[1] if value.dim() > 1 else None
    return None, None


def _names(host: Host) -> list[str]:
    parameters = inspect.signature(inspect.unwrap(host.original_class.forward)).parameters
    return [n for n, p in parameters.items() if n != "self" and p.kind is not p.VAR_KEYWORD]


def _present(given: dict[str, Any], *names: str) -> Tensor:
    found = next((given[n] for n in names if given.get(n) is not None), None)
    if found is None:
        raise UnsupportedError(f"a prompt needs one of {', '.join(names)} in the call")
    return found  # type: ignore[no-any-return]


def _encoder_decoder(roster: Roster) -> bool:
    return bool(getattr(getattr(roster.model, "config", None), "is_encoder_decoder", False))


def _valid(call: Call, mask: Tensor) -> Tensor:
    """The mask of the virtual block, (rows, block): a row's own prompt at its right end."""
    block = call.block
    lengths = [call.sequences[n].shape[0] if n in call.sequences else 0 for n in call.route.names_for(mask.shape[0])]
    slots = torch.arange(block, device=mask.device)[None, :]
    first = block - torch.tensor(lengths, device=mask.device)[:, None]
    return (slots >= first).to(mask.dtype)


def _block(call: Call, embeds: Tensor) -> Tensor:
    """The virtual block itself, (rows, block, hidden); unused slots are zero and masked."""
    block, names = call.block, call.route.names_for(embeds.shape[0])
    padded = {
        n: nn.functional.pad(s.to(embeds.dtype), (0, 0, block - s.shape[0], 0)) for n, s in call.sequences.items()
    }
    empty = embeds.new_zeros((block, embeds.shape[2]))
    return torch.stack([padded.get(n, empty) if n is not None else empty for n in names])


def _arranged(call: Call, mask: Tensor) -> Call:
    """The call with the order of an encoder's sequence, where some row's text begins behind padding.

    A prompt stands directly in front of its text, so that distances are those of the row alone: padding first,
    then the virtual block, then the text.
    """
    leading, block = _leading(mask)[:, None], call.block
    if not torch.compiler.is_compiling() and not bool(leading.any()):
        return replace(call, order=None)
    slots = torch.arange(block + mask.shape[1], device=mask.device)[None, :]
    order = torch.where(slots < leading, slots + block, torch.where(slots < leading + block, slots - leading, slots))
    return replace(call, order=order)


def _joined_rows(call: Call, virtual: Tensor, text: Tensor) -> Tensor:
    """Block and text along the tokens, in the call's order."""
    whole = torch.cat([virtual.to(text.dtype), text], dim=1)
    return whole if call.order is None else _taken(whole, call.order)


def _text(call: Call, whole: Tensor) -> Tensor:
    """The text's part of an encoder's output, in the order of the input."""
    if call.order is None:
        return whole[:, call.block :]
    return _taken(whole, call.order.argsort(1)[:, call.block :])


def _taken(values: Tensor, order: Tensor) -> Tensor:
    """Tokens in another order, each row its own."""
    index = order if values.dim() == 2 else order[..., None].expand(*order.shape, values.shape[2])
    return values.gather(1, index)


def _cut(out: Any, call: Call) -> None:
    """Cut the virtual positions out of an encoder's outputs, in place."""
    out.last_hidden_state = _text(call, out.last_hidden_state)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(_text(call, h) for h in out.hidden_states)
    if getattr(out, "attentions", None) is not None:
        if call.order is not None:
            raise UnsupportedError("attention weights behind a prompt need padding on the right")
        out.attentions = tuple(None if a is None else a[..., call.block :, call.block :] for a in out.attentions)
