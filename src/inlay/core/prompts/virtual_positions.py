"""How virtual positions enter a model and never show.

    decoder            a token prompt is run through the model once a call (one row, however many rows the
                       batch has), and its keys and values stand in front of every row's own. This is exact,
                       because nothing after the prompt can change it. The text's positions shift by its length.
    encoder            a token prompt joins the sequence: embeddings, mask and token types grow on the left, and
                       the outputs are cut back. Rows with shorter prompts, or none, have masked slots there.
    key/value prompt   stands in front of the text's own keys and values at its attention modules.

The functions here wrap the forwards of special modules (listed in `core/class_exchange.py`). Prompts are computed in
`core/prompts/prefill.py`; how they join an encoder's sequence is in `core/prompts/encoder_sequence.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.forward import wrappers
from inlay.core.forward.active_adapters import Roster
from inlay.core.forward.call import Call
from inlay.core.forward.host import Host, thread
from inlay.core.forward.route import Route
from inlay.core.prompts import encoder_sequence, prefill
from inlay.core.prompts.span import span_of

Forward = Callable[..., Any]
INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids", "inputs", "attention_mask", "input_values")


def root(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """The model's own forward, with the fast paths around it."""
    for around in wrappers.around_root():
        inner = partial(around, host, inner)
    return entered(host, inner, *args, **kwargs)


def entered(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """A forward of the whole model: check the rows, compute the prompts, hide their positions in the outputs."""
    roster = host.roster
    route, call = roster.current(), roster.call.get()
    if roster.merged is not None:
        roster.check_merged(route)
        return inner(*args, **kwargs)
    rows, tokens = _shape(args, kwargs)
    if rows is not None:
        route.check_rows(rows)
    if call is not None and (call.capture is not None or call.rows is not None):
        return inner(*args, **kwargs)  # a prompt is being prefilled, or a forward around the model's own calls it
    if call is None:
        prompted = any(roster.has_prompt(n) for n in route.used)
        if route.single and not prompted and not _reads_span(roster, route):
            return inner(*args, **kwargs)
        call = prefill.prepare(roster, route) if prompted else Call(route)
    given = _given(host, args, kwargs)
    stacks = None if route.single or not prefill.stackable() else roster.kept.of(route)
    call = replace(call, rows=rows, tokens=tokens, padding=_padding(call, given), stacks=stacks)
    if rows is not None and tokens is not None and not _encoder_decoder(roster) and _reads_span(roster, route):
        labelled = given if _generates(host.module) else {**given, "labels": None}
        call = replace(call, span=span_of(labelled, rows, tokens, call.prompt))
    if not (call.block and _encoder_decoder(roster)):
        with roster.bind(route, call):
            return inner(*args, **kwargs)
    return _seq2seq(roster, inner, call, given)


def _padding(call: Call, given: dict[str, Any]) -> Tensor | None:
    """The number of masked tokens in front of each row's text, so that a prompt stays next to its text."""
    mask = given.get("attention_mask")
    if not call.shifts or given.get("position_ids") is not None or mask is None or mask.dim() != 2:
        return None
    return encoder_sequence.padding_ahead(mask)


def _seq2seq(roster: Roster, inner: Forward, call: Call, given: dict[str, Any]) -> Any:
    """An encoder–decoder with virtual tokens in its encoder: the decoder's mask must cover them."""
    mask, block = given.get("attention_mask"), call.block
    encoded = given.get("encoder_outputs")
    source = encoded[0] if encoded is not None else _present(given, "input_ids", "inputs_embeds")
    length = source.shape[1] - (block if encoded is not None else 0)
    if mask is None:
        mask = source.new_ones((source.shape[0], length), dtype=torch.long)
    call = encoder_sequence.arranged(call, mask)
    given["attention_mask"] = encoder_sequence.joined(call, encoder_sequence.valid(call, mask), mask)
    as_tuple = _wants_tuple(roster.model, given)
    with roster.bind(call.route, call):
        out = inner(**{**given, "return_dict": True})
    if encoded is None and getattr(out, "encoder_last_hidden_state", None) is not None:
        out.encoder_last_hidden_state = encoder_sequence.text_of(call, out.encoder_last_hidden_state)
    if encoded is None and getattr(out, "encoder_hidden_states", None) is not None:
        out.encoder_hidden_states = tuple(encoder_sequence.text_of(call, h) for h in out.encoder_hidden_states)
    return out.to_tuple() if as_tuple else out


def stack(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """An encoder that virtual tokens join."""
    roster = host.roster
    call = roster.call.get()
    if call is None and any(roster.has_prompt(n) for n in roster.current().used):
        call = prefill.prepare(roster, roster.current())
    if call is None or not call.sequences:
        return inner(*args, **kwargs)
    given = _given(host, args, kwargs)
    embeds = given.get("inputs_embeds")
    if embeds is None:
        embeds = host.module.get_input_embeddings()(given["input_ids"])  # type: ignore[operator]
    if call.span is not None:
        raise UnsupportedError(
            "virtual tokens in an encoder shift the positions at which another delta acts; use the two separately"
        )
    call, given = encoder_sequence.enter(replace(call, rows=embeds.shape[0]), given, embeds)
    as_tuple = _wants_tuple(host.module, given)
    given |= {"return_dict": True} if as_tuple else {}
    with roster.bind(call.route, call):
        out = inner(**given)
    if not _encoder_decoder(roster):
        encoder_sequence.cut(out, call)
    return out.to_tuple() if as_tuple else out


def source(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """The encoder of an encoder–decoder, which generation calls directly; what it reads is the prompt."""
    roster = host.roster
    call = roster.call.get() or Call(roster.current())
    rows, tokens = _shape(args, kwargs)
    if rows is None or tokens is None or roster.merged is not None or not _reads_span(roster, call.route):
        return inner(*args, **kwargs)
    given = _given(host, args, kwargs)
    with roster.bind(call.route, replace(call, span=span_of(given, rows, tokens))):
        return inner(*args, **kwargs)


def pooler(host: Host, inner: Forward, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The pooler must read the first token of the text, not of the prompt."""
    call = host.roster.call.get()
    return inner(hidden if call is None or not call.block else encoder_sequence.text_of(call, hidden), *args, **kwargs)


def weighing(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """Attention whose input decides how much each pair counts; passes it on to the attention function."""
    call = host.roster.call.get()
    if call is None or not any(len(call.prefixes.get(n, {}).get(host.path, ())) == 4 for n in call.route.used):
        return inner(*args, **kwargs)
    host.entered[thread()] = args[0] if args else kwargs["hidden_states"]
    try:
        return inner(*args, **kwargs)
    finally:
        host.entered.pop(thread(), None)


def rotary(host: Host, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """Rotary positions, shifted by each row's prompt."""
    if "position_ids" in kwargs:
        return inner(*args, **{**kwargs, "position_ids": shift(host, kwargs["position_ids"], relative=True)})
    return inner(args[0], shift(host, args[1], relative=True), *args[2:], **kwargs)


def shift(host: Host, positions: Tensor, *, relative: bool = False) -> Tensor:
    """Positions of the text after each row's prompt.

    In a decoder the text begins after the prompt. In an encoder the sequence has as many slots as the longest prompt
    for all rows, so rows with shorter prompts shift back. If only differences of positions count (`relative`), padding
    in front of a row does not separate it from its prompt.
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
    """Run all of `generate` under one route, with the prompts computed once."""
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
    with torch.no_grad(), roster.bind(route, replace(prefill.prepare(roster, route), prompt=tokens)):
        yield


def _copies(model: Any, kwargs: dict[str, Any]) -> int:
    """How many rows generation makes of each row: beams or samples."""
    config = kwargs.get("generation_config") or model.generation_config
    values = [kwargs.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences")]
    return max(values)


def _reads_span(roster: Roster, route: Route) -> bool:
    return any(roster.reads_span(n) for n in route.used)


# -- small parts ------------------------------------------------------------------------------------


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, int | None]:
    """Rows and tokens of a batch: the leading dimensions of the first tensor among the inputs."""
    for value in (*args, *(kwargs.get(n) for n in INPUTS), *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0], value.shape[1] if value.dim() > 1 else None
    return None, None


def _given(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward, by name."""
    if not args:
        return dict(kwargs)
    parameters = inspect.signature(inspect.unwrap(host.original_class.forward)).parameters
    names = [n for n, p in parameters.items() if n != "self" and p.kind is not p.VAR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _present(given: dict[str, Any], *names: str) -> Tensor:
    found = next((given[n] for n in names if given.get(n) is not None), None)
    if found is None:
        raise UnsupportedError(f"with a prompt, the model's call needs one of {', '.join(names)}")
    return found  # type: ignore[no-any-return]


def _generates(model: nn.Module) -> bool:
    """Whether the model's labels are tokens that follow a prompt, not tags for all tokens."""
    says: Callable[[], bool] | None = getattr(model, "can_generate", None)
    return says is None or says()


def _wants_tuple(model: nn.Module, given: dict[str, Any]) -> bool:
    """Whether the call, or else the configuration, asks for a plain tuple as output."""
    asked = given.get("return_dict")
    return not (getattr(getattr(model, "config", None), "return_dict", True) if asked is None else asked)


def _encoder_decoder(roster: Roster) -> bool:
    return bool(getattr(getattr(roster.model, "config", None), "is_encoder_decoder", False))


wrappers.register("rotary", rotary)
wrappers.register("weighing", weighing)
wrappers.register("pooler", pooler)
wrappers.register("stack", stack)
wrappers.register("source", source)
wrappers.register("root", root)
