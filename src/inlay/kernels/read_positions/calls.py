"""Which calls of a model may skip positions: the decision at the model's root.

A model that pools its hidden states, and returns nothing else, never uses some of what it computes:

    padding         positions whose mask is 0 reach no output, so linear layers and activations need not compute them
    the last block  if only the first position of a row is pooled, queries, attention output and feed-forward of the
                    last block need only that: 10 of the 12 products of an encoder block, forward and backward

Attention, norms, residuals and the base's dropout still see every position, so dropout masks are the same as without
this path. Which modules may skip what is tried on a copy of the model (`trial.py`) at the first call of each form:
names and types of the arguments, kinds of deltas, training or not, precision, order of magnitude of the length. A model
that returns hidden states or token scores reads every position, so there only keys and values can skip padding.

A trial that passed could be wrong for a later call. These are the ways, and what happens:

    the configuration or a module was replaced                          tried again
    the model reads where the padding tokens end (`[last token]`)       plain, unless padding tokens and mask agree
    an argument had one value everywhere in the trial, and now varies   another form, tried by itself
    a mask other than 0/1, a row of nothing but padding, prompts, several adapters, a merged adapter      plain
    hooks, replaced forwards, checkpointing, a trained base, modules in unequal modes, torch.func, jit    plain
    tensors that are not on a CPU (finding the positions would wait for the device), short batches        plain
    anything else: an attribute of the user's own class, say            the backward pass finds a gradient at a skipped
                                                                        position and raises

What remains assumed, for calls without gradients: nothing but configuration, modules, mask and arguments decides which
positions are read, and nobody picks up hidden states other than through outputs or hooks.
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
from inlay.core.forward.transforms import transformed, watched
from inlay.kernels.lazy import Mode
from inlay.kernels.read_positions.index import Index
from inlay.kernels.read_positions.modules import FEATURE, Short, asked_already, asking, parameters
from inlay.kernels.read_positions.probe import Batch, with_first
from inlay.kernels.read_positions.trial import Found, tried

FEWEST = 128  # positions in a batch; below, gathering costs what the smaller products save
FEWEST_TOKENS = 4  # in a row; below, first and last, masked and unmasked cannot be told apart
MOST_READ = 0.95  # share of positions; above, padding is computed along
MOST_TRIALS = 32  # of one model; one whose configuration changes all the time is left alone

Form = tuple[Any, ...]


@dataclass(eq=False)
class _Seen:
    """What is known about a model.

    Attributes:
        listens: whether any of its modules could skip positions.
        found: form of call → result of its trial, None if nothing can be skipped.
        modules, config: at the time of the trials; results hold only as long as both are unchanged.
        trials: how many there were.
    """

    listens: bool
    found: dict[Form, Found | None] = field(default_factory=dict)
    modules: list[weakref.ref[nn.Module]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    trials: int = 0

    def holds_for(self, modules: list[nn.Module], config: Any) -> bool:
        """Whether modules and configuration are those of the trials."""
        return (
            len(modules) == len(self.modules)
            and all(map(operator.is_, modules, (ref() for ref in self.modules)))
            and getattr(config, "__dict__", {}) == self.config
        )


_SEEN: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()
_KINDS: weakref.WeakKeyDictionary[Adapter, frozenset[Any] | None] = weakref.WeakKeyDictionary()


def around(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own forward; modules skip positions where this call allows it."""
    rewritten = transformed() or torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    short = None if rewritten or asked_already(host.roster) else _short(host, args, kwargs)
    if short is None:
        return inner(*args, **kwargs)
    with asking(short):
        out = inner(*args, **kwargs)
    short.finish()
    return out


def forget(model: nn.Module) -> None:
    """Drop what is known about a model, so that its next call is tried again."""
    _SEEN.pop(model, None)


def _short(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Short | None:
    """What the modules do in this call; None if they compute everything."""
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
    """The modules with the positions that each needs in this batch."""
    needed = with_first(unmasked)
    few = bool(found.masked) and int(needed.sum()) <= MOST_READ * needed.numel()
    if not few and not found.first:
        return None
    first = torch.zeros_like(needed).index_fill(1, torch.tensor(0), True)
    return Short(host.roster, found.wanted(Index.of(needed) if few else None, Index.of(first)), found.handed)


def _found(
    seen: _Seen, form: Form, model: Any, adapter: Adapter | None, batch: Batch, modules: list[nn.Module]
) -> Found | None:
    """The result of this form's trial, which is made now if there was none or the model has changed."""
    if not seen.holds_for(modules, getattr(model, "config", None)):
        seen.found = {form: found for form, found in seen.found.items() if found is None}
    if form in (known := seen.found):
        return known[form]
    if seen.trials >= MOST_TRIALS:
        return None
    seen.trials += 1
    # In a context of its own, so that nothing bound here (routes, packed texts, another trial) reaches the copy.
    found, config = contextvars.Context().run(tried, model, adapter, batch)
    if found is not None:
        # The copy's configuration: models complete theirs in their first call (`problem_type`).
        seen.modules, seen.config = list(map(weakref.ref, modules)), config
    seen.found[form] = found
    return found


def _batch(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch | None:
    """The arguments, if this is a batch of texts on the CPU, large enough, and nothing in it is of an unknown kind."""
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
    """What is equal for all calls that one trial decides about."""
    given = sorted((n, _kind(batch, n, v)) for n, v in batch.given.items() if v is not None)
    autocast = Mode.now(torch.device("cpu")).autocast
    return (*given, training, autocast, kinds, batch.tokens.bit_length())


def _kind(batch: Batch, name: str, value: Any) -> str:
    """Type of a tensor, and its value if that is the same at every position: a trial has seen no other then."""
    if not isinstance(value, Tensor):
        return repr(value)
    same = name not in (batch.text, batch.mask) and batch.by_position(value) and bool((value == value[0, 0]).all())
    return f"{value.dtype} {value.dim()} {value[0, 0].tolist() if same else ''}"


def _kinds(adapter: Adapter | None) -> frozenset[Any] | None:
    """The kinds of deltas and copies in an adapter; None if some piece is a prompt or reads other positions."""
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
    """Which positions are not masked, (rows, tokens); None if the mask is not 0/1 or masks a whole row."""
    x = batch.given[batch.text]
    if batch.mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool)
    mask = batch.given[batch.mask]
    unmasked: Tensor = mask != 0
    whole = bool(unmasked.any(1).all()) and bool((unmasked.to(mask.dtype) == mask).all())
    return unmasked if whole else None


def _agrees(batch: Batch, unmasked: Tensor) -> bool:
    """Whether exactly the masked positions hold the padding token."""
    return torch.equal(batch.given[batch.text] != batch.padding, unmasked)


def _bare(model: nn.Module, name: str | None) -> list[nn.Module] | None:
    """The base's modules; None if something is in the way: hooks (on the deltas of adapter `name` as well), a replaced
    forward, checkpointing, a trained base, modules in unequal modes."""
    found: list[nn.Module] = []
    waiting: list[tuple[nn.Module, bool]] = [(model, False)]
    while waiting:
        module, adapted = waiting.pop()
        if watched(module) or (module is not model and _has_own_forward(module)):
            return None
        if not adapted:
            trained = any(p is not None and p.requires_grad for p in module._parameters.values())
            if trained or module.training != model.training or module.__dict__.get("gradient_checkpointing"):
                return None
            found.append(module)
        for child in module._modules.values():
            if isinstance(child, Storage) and not adapted:
                waiting += [(child._modules[name], True)] if name in child._modules else []
            elif child is not None:
                waiting.append((child, adapted))
    return found


def _has_own_forward(module: nn.Module) -> bool:
    host: Host | None = module.__dict__.get("_inlay_host")
    return "forward" in module.__dict__ or (host is not None and host.original_forward is not None)
