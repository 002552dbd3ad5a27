"""Which calls of a model may go the short way: the root's part.

Of a model that pools its states, and returns nothing else, a step need not compute what nobody reads:

    padding         positions whose mask is 0 reach no output: linear layers and activations compute the rest
    the last block  what pools only a row's first position needs only that of queries, attention's output and the
                    feed-forward there: 10 of its 12 products in an encoder whose feed-forward is four times as wide

Attention, norms, residuals and the base's dropout keep every position, so masks of dropout stay the base's own. Which
modules this holds for is tried on a copy of the model (`trial.py`), at the first call of a form: the names and types of
its arguments, what kinds of deltas act, whether it trains, its precision, the order of size of its length. A model that
returns hidden states or scores of tokens is seen to read every position, padding included, of all but keys and values.

What a trial cannot say is refused at every call, or noticed:

    the configuration, the model's modules   have to be those of the trial; others are tried in their turn
    a mask that is no 0 or 1, a row of padding only, one token, other devices, several adapters or prompts    refused
    hooks and forwards of the user's, checkpoints, a base that is trained, a merged adapter, transforms       refused
    a reader that padding tokens decide (the last token that is none)   refused where mask and padding tokens differ
    anything else that makes a model read another position later        its gradient arrives where none may, and raises

Assumed, then, of a call without gradients only: that no value outside of configuration, modules, mask and tokens (an
attribute of the user's own class) changes what a model reads, and that no one keeps hidden states on the side.
"""

from __future__ import annotations

import contextvars
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapted_modules import hosts_of
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.pieces import DeltaPiece, PromptPiece
from inlay.core.forward.host import Host, Storage
from inlay.core.forward.transforms import transformed
from inlay.core.upstream import has_any_global_hook
from inlay.kernels.lazy import Mode
from inlay.kernels.read_positions.index import Index
from inlay.kernels.read_positions.modules import FEATURE, Short, asking, parameters
from inlay.kernels.read_positions.probe import Batch, with_first
from inlay.kernels.read_positions.trial import Found, tried

FEWEST = 128  # positions in a batch: below, gathering takes what the products save
FEWEST_TOKENS = 4  # in a row, so that first and last, masked and not can be told apart
MOST_READ = 0.95  # share of positions: above, padding is computed with the rest
MOST_TRIALS = 32  # of one model: one whose configuration never rests is left alone

Form = tuple[Any, ...]


@dataclass(eq=False)
class _Seen:
    """What is known of a model.

    Attributes:
        listens: whether it has candidates at all.
        found: form of call → what its trial showed.
        modules, config: as they were at the last trial; what is found holds for these only.
    """

    listens: bool
    found: dict[Form, Found | None] = field(default_factory=dict)
    modules: list[weakref.ref[nn.Module]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    trials: int = 0

    def holds_for(self, modules: list[nn.Module], config: Any) -> bool:
        """Whether the model is what it was."""
        return (
            len(modules) == len(self.modules)
            and all(map(operator.is_, modules, (ref() for ref in self.modules)))
            and getattr(config, "__dict__", {}) == self.config
        )


_SEEN: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()
_KINDS: weakref.WeakKeyDictionary[Adapter, frozenset[Any] | None] = weakref.WeakKeyDictionary()


def around(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own forward."""
    traced = transformed() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    short = None if traced else _short(host, args, kwargs)
    if short is None:
        return inner(*args, **kwargs)
    with asking(short):
        out = inner(*args, **kwargs)
    short.finish()
    return out


def forget(model: nn.Module) -> None:
    """Let the next calls be tried again."""
    _SEEN.pop(model, None)


def _short(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Short | None:
    """What the model's modules are asked to do in this call; None for the plain way."""
    model, roster = host.module, host.roster
    seen = _SEEN.get(model)
    if seen is None:
        seen = _SEEN[model] = _Seen(any(FEATURE in h.features for h in hosts_of(model)))
    batch = _batch(host, args, kwargs) if seen.listens else None
    route = roster.current()
    if batch is None or not route.single or roster.call.get() is not None or roster.merged is not None:
        return None
    adapter = None if route.names[0] is None else roster.require(route.names[0])
    kinds = _kinds(adapter)
    form = None if kinds is None else _form(batch, model.training, kinds)
    if form is None or (form in seen.found and seen.found[form] is None):
        return None
    modules = _bare(model, route.names[0])
    unmasked = None if modules is None else _unmasked(batch)
    if modules is None or unmasked is None:
        return None
    found = _found(seen, form, model, adapter, batch, modules)
    if found is None or (found.agreeing and not _agrees(batch, unmasked)):
        return None
    return _asked(host, found, unmasked)


def _asked(host: Host, found: Found, unmasked: Tensor) -> Short | None:
    needed = with_first(unmasked)
    few = bool(found.masked) and int(needed.sum()) <= MOST_READ * needed.numel()
    if not few and not found.first:
        return None
    first = torch.zeros_like(needed).index_fill(1, torch.tensor(0), True)
    return Short(host.roster, found.wanted(Index.of(needed) if few else None, Index.of(first)), found.handed)


def _found(
    seen: _Seen, form: Form, model: Any, adapter: Adapter | None, batch: Batch, modules: list[nn.Module]
) -> Found | None:
    """What a trial of this form showed, of the model as it is."""
    config = getattr(model, "config", None)
    if not seen.holds_for(modules, config):
        seen.found = {form: found for form, found in seen.found.items() if found is None}
    if form not in seen.found:
        if seen.trials >= MOST_TRIALS:
            return None
        seen.trials += 1
        found, behind = contextvars.Context().run(tried, model, adapter, batch)
        seen.found[form] = found
        if found is not None:
            # A model may complete its configuration in its first call (what kind of problem its labels are).
            seen.modules, seen.config = list(map(weakref.ref, modules)), behind
    return seen.found[form]


def _batch(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch | None:
    """The call, where it is one of texts on a CPU that is worth the trouble, with nothing unknown in it."""
    given = kwargs if not args else {**dict(zip(parameters(host.original_class.forward), args, strict=False)), **kwargs}
    text = next((n for n in ("input_ids", "inputs_embeds") if given.get(n) is not None), None)
    if text is None:
        return None
    x, mask = given[text], given.get("attention_mask")
    dims = 2 if text == "input_ids" else 3
    if type(x) is not Tensor or x.dim() != dims or x.shape[0] * x.shape[1] < FEWEST or x.shape[1] < FEWEST_TOKENS:
        return None
    if mask is not None and (type(mask) is not Tensor or mask.shape != x.shape[:2]):
        return None
    if not all(v is None or type(v) in (bool, int, float, str) or _plain(v) for v in given.values()):
        return None
    padding = getattr(getattr(host.module, "config", None), "pad_token_id", None)
    told = padding if text == "input_ids" and mask is not None and type(padding) is int else None
    return Batch(given, x.shape[0], x.shape[1], text, None if mask is None else "attention_mask", told)


def _plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu"


def _form(batch: Batch, training: bool, kinds: frozenset[Any]) -> Form:
    """What calls that one trial speaks for have in common."""
    given = sorted((n, _kind(batch, n, v)) for n, v in batch.given.items() if v is not None)
    autocast = Mode.now(torch.device("cpu")).autocast
    return (*given, training, autocast, kinds, batch.tokens.bit_length())


def _kind(batch: Batch, name: str, value: Any) -> str:
    """Of something with an entry for every position also which one all are, as a trial knows no others then."""
    if not isinstance(value, Tensor):
        return repr(value)
    same = name not in (batch.text, batch.mask) and batch.by_position(value) and bool((value == value[0, 0]).all())
    return f"{value.dtype} {value.dim()} {value[0, 0].tolist() if same else ''}"


def _kinds(adapter: Adapter | None) -> frozenset[Any] | None:
    """What kinds of deltas and copies an adapter is made of; None where some do not act position by position."""
    if adapter is None:
        return frozenset()
    if adapter not in _KINDS:
        deltas = [piece for piece in adapter.pieces if isinstance(piece, DeltaPiece)]
        apart = adapter.reads_span or any(isinstance(p, PromptPiece) for p in adapter.pieces)
        fed = any(piece.site.fed_by for piece in deltas)
        others = {p.name for p in adapter.pieces if not isinstance(p, (DeltaPiece, PromptPiece))}
        kinds = frozenset({type(piece.delta) for piece in deltas} | others | set(adapter.copies))
        _KINDS[adapter] = None if apart or fed else kinds
    return _KINDS[adapter]


def _unmasked(batch: Batch) -> Tensor | None:
    """Which positions are not masked, (rows, tokens); None where the mask says something else, or masks a whole row."""
    x = batch.given[batch.text]
    if batch.mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool)
    mask = batch.given[batch.mask]
    unmasked: Tensor = mask != 0
    whole = bool(unmasked.any(1).all()) and bool((unmasked.to(mask.dtype) == mask).all())
    return unmasked if whole else None


def _agrees(batch: Batch, unmasked: Tensor) -> bool:
    return torch.equal(batch.given[batch.text] != batch.padding, unmasked)


def _bare(model: nn.Module, name: str | None) -> list[nn.Module] | None:
    """The modules that a call goes through; None where something of the user's watches or changes what they compute,
    trains them, or runs them again."""
    if has_any_global_hook():
        return None
    found: list[nn.Module] = []
    waiting: list[tuple[nn.Module, bool]] = [(model, False)]
    while waiting:
        module, adapted = waiting.pop()
        own = module.__dict__
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return None
        if own.get("gradient_checkpointing") or (module is not model and _has_own_forward(own)):
            return None
        if not adapted:
            if any(p is not None and p.requires_grad for p in module._parameters.values()):
                return None
            found.append(module)
        for child in module._modules.values():
            if isinstance(child, Storage) and not adapted:
                waiting += [(child._modules[name], True)] if name in child._modules else []
            elif child is not None:
                waiting.append((child, adapted))
    return found


def _has_own_forward(own: dict[str, Any]) -> bool:
    host: Host | None = own.get("_inlay_host")
    return "forward" in own or (host is not None and host.original_forward is not None)
