"""Putting adapters into a model and taking them out again; all or nothing.

    build every piece ─▶ check ─▶ install at hosts ─▶ activate
    (model untouched)            (undone if it fails)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from inlay.core import roles
from inlay.core.adapted import adopt, release
from inlay.core.adapter import Adapter
from inlay.core.attention import implementation
from inlay.core.delta import Delta
from inlay.core.errors import AdapterNameError, SelectionError, UnsupportedError, problems
from inlay.core.host import Host, Storage
from inlay.core.method import Method
from inlay.core.pieces import DeltaPiece, Piece, PromptPiece, SubsetPiece
from inlay.core.prompt import TokenPrompt
from inlay.core.roster import Roster, find_roster, roster_of
from inlay.core.select import Places, Where
from inlay.core.view import ModelView

NAME = re.compile(r"[A-Za-z0-9_-]+")


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    where: Where | None = None,
    layers: Sequence[int] | None = None,
    modules_to_save: Sequence[str] = (),
) -> Adapter:
    """Put a method's trained pieces into `model`, in place; the base is frozen, the adapter active and trainable.

    Args:
        name: under which the adapter is used, saved and detached; letters, digits, ``_`` and ``-``.
        where: places (`core/select.py`); the paper's own where None.
        layers: numbers of the layers to stay within.
        modules_to_save: ends of module names that the adapter trains whole, as copies of its own.

    Raises:
        AdapterNameError: the name is taken or ill-formed.
        SelectionError: `where`, `layers` or `modules_to_save` match nothing, or what the method cannot adapt.
        UnsupportedError: the method cannot be exact on this model. In every case the model is as it was.
    """
    adapter = build(model, method, name=name, places=Places.of(where, layers), modules_to_save=modules_to_save)
    initialise(model, adapter)
    install(model, adapter, trainable=True)
    return adapter


def build(
    model: nn.Module, method: Method, *, name: str, places: Places, modules_to_save: Sequence[str] = ()
) -> Adapter:
    """Everything `attach` installs, with uninitialised parameters; the model is not touched."""
    roster = find_roster(model)
    if not NAME.fullmatch(name):
        raise AdapterNameError(f"adapter name {name!r} may hold letters, digits, '_' and '-' only")
    if roster is not None and name in roster.adapters:
        raise AdapterNameError(f"adapter {name!r} is already on this model; detach it first, or choose another name")
    if roster is not None and roster.merged is not None:
        raise UnsupportedError(f"adapter {roster.merged.name!r} is merged into this model; call unmerge() first")
    view = ModelView(model)
    saved = _saved_modules(view, modules_to_save)
    pieces = method.pieces(view, places)
    pieces = _outside(pieces, saved, explicit=places.where is not None and not isinstance(places.where, str))
    _check_parts(pieces, method)
    copies = {}
    for path in saved:
        for parameter_name, value in view.modules[path].named_parameters(prefix=path):
            dtype = value.dtype if value.dtype == torch.float64 else torch.float32
            copies[parameter_name] = nn.Parameter(value.detach().to(dtype, copy=True))
    return Adapter(name, method, _storable(places, pieces), pieces, copies, tuple(saved))


def initialise(model: nn.Module, adapter: Adapter) -> None:
    """Fill a built adapter's parameters as its paper says."""
    view = ModelView(model)
    with torch.no_grad():
        for piece in adapter.pieces:
            if isinstance(piece, DeltaPiece):
                piece.delta.initialise(piece.site)
            elif isinstance(piece, PromptPiece):
                piece.prompt.initialise(view)


def install(model: nn.Module, adapter: Adapter, *, trainable: bool) -> None:
    """Put a built adapter at its hosts, or leave the model as it was."""
    roster = find_roster(model)
    fresh = roster is None
    if roster is None:
        roster = _enlist(model)
    try:
        _place(roster, adapter)
    except BaseException:
        roster.adapters.pop(adapter.name, None)
        _remove(roster, adapter)
        if fresh:
            _dismiss(roster)
        raise
    adapter.trainable = trainable
    roster.active = adapter.name


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter out; with the last one the model is as it was before the first attach.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    roster = roster_of(model)
    adapter = roster.require(name)
    if roster.merged is not None:
        raise UnsupportedError(f"adapter {roster.merged.name!r} is merged into this model; call unmerge() first")
    del roster.adapters[name]
    _remove(roster, adapter)
    if roster.active == name:
        roster.active = next(reversed(roster.adapters), None)
    if not roster.adapters:
        _dismiss(roster)


@contextmanager
def use(model: nn.Module, choice: str | None | Sequence[str | None]) -> Iterator[None]:
    """Choose the active adapter for a block: a name, None for the base, or one of these a row.

    Holds for the calling thread or task only, and ends however the block is left. Nothing about
    training changes: which adapter is active and which is trainable are separate.

    Raises:
        AdapterNameError: a name is unknown.
        RouteError: the adapters cannot share a batch.
    """
    roster = roster_of(model)
    route = roster.check(choice)
    with roster.bind(route, None):
        yield


def adapters(model: nn.Module) -> Mapping[str, Adapter]:
    """Name → adapter, in the order of attaching; empty for a model without any."""
    roster = find_roster(model)
    return MappingProxyType(roster.adapters if roster is not None else {})


# -- building ---------------------------------------------------------------------------------------


def _saved_modules(view: ModelView, wanted: Sequence[str]) -> list[str]:
    found, wrong = [], []
    for word in wanted:
        paths = [p for p in view.modules if p and (p == word or p.endswith("." + word))]
        if not paths:
            wrong.append(f"{word!r} matches no module")
        elif not any(True for p in paths for _ in view.modules[p].parameters()):
            wrong.append(f"{word!r} has no parameters to train")
        found += [p for p in paths if p not in found]
    if wrong:
        raise SelectionError(problems("modules_to_save", wrong))
    return found


def _outside(pieces: list[Piece], saved: list[str], *, explicit: bool) -> list[Piece]:
    """Drop pieces inside modules that are trained whole anyway; refuse where the user named both."""
    inside = [p for p in pieces if not isinstance(p, PromptPiece) and _covered(_path(p), saved)]
    if inside and explicit:
        raise SelectionError(
            problems("where", [f"{p.key} lies in a module of modules_to_save, which is trained whole" for p in inside])
        )
    left = [p for p in pieces if p not in inside]
    if inside and not left:
        raise SelectionError("where: every place lies in a module of modules_to_save, so nothing is left to adapt")
    return left


def _covered(path: str, saved: list[str]) -> bool:
    return any(path == s or path.startswith(s + ".") for s in saved)


def _check_parts(pieces: list[Piece], method: Method) -> None:
    """A part of a fused layer shares its input with the other parts, so it cannot change it."""
    changed = [p.key for p in pieces if isinstance(p, DeltaPiece) and p.site.part and type(p.delta).pre is not Delta.pre]
    if changed:
        raise UnsupportedError(
            f"method {method.name!r} changes what enters a layer, but {', '.join(changed[:4])} shares its input with "
            "other parts of a fused matrix; adapt the whole layer, or the layer before it"
        )


def _storable(places: Places, pieces: list[Piece]) -> Places:
    """A predicate cannot be written to a file; the sites it chose can."""
    if not callable(places.where):
        return places
    return replace(places, where=tuple(p.key for p in pieces), layers=None)


def _path(piece: Piece) -> str:
    return piece.path if isinstance(piece, SubsetPiece) else piece.site.path if isinstance(piece, DeltaPiece) else ""


# -- installing -------------------------------------------------------------------------------------


def _enlist(model: nn.Module) -> Roster:
    """Make a model a host of adapters: freeze it, remember its flags, wrap its root and checkpointed layers."""
    for path, module in model.named_modules():
        if "_inlay_host" in module.__dict__:
            raise UnsupportedError(
                f"{path or 'this module'} already belongs to another attached model; attach to the same root for all adapters"
            )
    roster = Roster(model)
    roster.requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    model.__dict__["_inlay_roster"] = roster
    _grant(roster, "", "root")
    for path, module in model.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            _grant(roster, path, "checkpoint")
    return roster


def _dismiss(roster: Roster) -> None:
    """The inverse of `_enlist`, once no adapter is left."""
    for host in roster.hosts.values():
        release(host)
    for config, original in roster.attention:
        config._attn_implementation = original
    roster.model.__dict__.pop("_inlay_roster", None)
    flags = roster.requires_grad
    for name, parameter in roster.model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def _place(roster: Roster, adapter: Adapter) -> None:
    for piece in adapter.pieces:
        match piece:
            case DeltaPiece():
                _place_delta(roster, adapter.name, piece)
            case SubsetPiece():
                owner = roster.model.get_submodule(piece.path)
                _place_parameter(roster, adapter.name, owner._parameters[piece.parameter], piece)
            case PromptPiece():
                _place_prompt(roster, adapter.name, piece)
    for full, copy in adapter.copies.items():
        path, _, parameter = full.rpartition(".")
        value = roster.model.get_submodule(path)._parameters[parameter]
        for host, own in _holders(roster, value):
            host.copies.setdefault(adapter.name, {})[own] = copy
            _store(host, adapter.name, f"copy_{own}", _Held(copy))
            _grant(roster, host.path, "forward")
    roster.adapters[adapter.name] = adapter


def _place_delta(roster: Roster, name: str, piece: DeltaPiece) -> None:
    site = piece.site
    host = _grant(roster, site.path, "forward")
    host.deltas.setdefault(name, []).append((site, piece.delta))
    _store(host, name, site.part.name if site.part else "delta", piece.delta)
    if site.source is not None:
        feeder = _grant(roster, site.source, "forward")
        if host not in feeder.feeds:
            feeder.feeds.append(host)


def _place_parameter(roster: Roster, name: str, value: nn.Parameter | None, piece: SubsetPiece) -> None:
    assert value is not None
    for host, parameter in _holders(roster, value):
        host.differences.setdefault(name, {})[parameter] = piece.difference
        if host.path == piece.path:
            _store(host, name, f"difference_{parameter}", piece.difference)
        _grant(roster, host.path)


def _holders(roster: Roster, value: nn.Parameter | None) -> list[tuple[Host, str]]:
    """Every module that holds this very parameter, tied partners included, and the name it has there."""
    return [
        (_host(roster, path), name)
        for path, module in ModelView(roster.model).modules.items()
        for name, held in module._parameters.items()
        if held is value and value is not None
    ]


def _place_prompt(roster: Roster, name: str, piece: PromptPiece) -> None:
    """Prepare the model for a prompt; its parameters live at the root."""
    view = ModelView(roster.model)
    root = _host(roster, "")
    if isinstance(roster.model, (nn.Sequential, nn.ModuleList)):
        raise UnsupportedError("a container has no text to put a prompt in front of")
    _store(root, name, piece.key, piece.prompt)
    encoder_path = _encoder_path(view)
    joins_encoder = isinstance(piece.prompt, TokenPrompt) and encoder_path is not None
    if joins_encoder:
        assert encoder_path is not None
        roster.encoder = True
        _grant(roster, encoder_path, "stack")
        if "pooler" in view.modules[encoder_path]._modules and view.modules[encoder_path]._modules["pooler"] is not None:
            _grant(roster, f"{encoder_path}.pooler" if encoder_path else "pooler", "pooler")
    else:
        for place in view.attention_places():
            _grant(roster, place.path, "attention")
            config = getattr(place.module, "config", view.config)
            original = config._attn_implementation or "eager"
            if implementation(original) != original:
                roster.attention.append((config, original))
                config._attn_implementation = implementation(original)
    _count_positions(roster, view, encoder_path, needed=isinstance(piece.prompt, TokenPrompt) and not joins_encoder)


def _encoder_path(view: ModelView) -> str | None:
    """Path of the bidirectional stack that token prompts join; None on a decoder-only model."""
    model = view.model
    paths = {id(m): p for p, m in view.modules.items()}
    if getattr(view.config, "is_encoder_decoder", False):
        return paths[id(model.get_encoder())]  # type: ignore[operator]
    if view.input_embedding is None:
        raise UnsupportedError(f"{type(model).__name__} has no token embeddings, so no virtual tokens can join its input")
    generates = getattr(model, "can_generate", None)
    if generates is not None and generates():
        return None
    try:
        causal = all(getattr(p.module, "is_causal", True) for p in view.attention_places())
    except UnsupportedError:
        causal = False
    return None if causal else paths[id(getattr(model, "base_model", model))]


def _count_positions(roster: Roster, view: ModelView, encoder_path: str | None, *, needed: bool) -> None:
    """Make the model's position tables count virtual positions."""
    found = 0
    for path, module in view.modules.items():
        learned = roles.LEARNED_POSITIONS.fullmatch(path) is not None
        if learned and not isinstance(module, nn.Embedding):
            raise UnsupportedError(f"{path} ({type(module).__name__}) computes positions in a way prompts cannot move")
        rotary = type(module).__name__.endswith("RotaryEmbedding")
        if learned or rotary:
            host = _grant(roster, path, "positions" if learned else "rotary")
            host.encoder = encoder_path is not None and (encoder_path == "" or path.startswith(encoder_path + "."))
            found += 1
    if needed and not found:
        raise UnsupportedError(
            f"the positions of {type(roster.model).__name__} are in none of the known places (learned table, rotary "
            "embedding), so a prompt cannot be put in front of its text exactly"
        )


class _Held(nn.Module):
    """Keeps a copied parameter in the module tree, so that optimizers, devices and state dicts see it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.value = parameter


def _host(roster: Roster, path: str) -> Host:
    host = roster.hosts.get(path)
    if host is None:
        host = roster.hosts[path] = Host(roster, path, roster.model.get_submodule(path))
    return host


def _grant(roster: Roster, path: str, *features: str) -> Host:
    """Give the host at `path` more to say in its module."""
    host = _host(roster, path)
    adopt(host, host.features | set(features))
    return host


def _store(host: Host, name: str, key: str, trained: nn.Module) -> None:
    """Put a trained module below the host's child `inlay`."""
    storage = host.module._modules.get("inlay")
    if not isinstance(storage, Storage):
        if storage is not None:
            raise UnsupportedError(f"{host.path} has a child named 'inlay' of its own")
        storage = Storage()
        host.module._modules["inlay"] = storage
    if name not in storage:
        storage[name] = Storage()
    slot = storage[name]
    assert isinstance(slot, Storage)
    slot[key.replace(".", "_")] = trained
    trained.train(host.module.training)


def _remove(roster: Roster, adapter: Adapter) -> None:
    """Take everything of an adapter out of its hosts; hosts that nobody uses get their class back."""
    name = adapter.name
    for host in roster.hosts.values():
        for owner in (host.deltas, host.differences, host.copies):
            owner.pop(name, None)
        storage = host.module._modules.get("inlay")
        if isinstance(storage, Storage) and name in storage:
            del storage[name]
            if len(storage) == 0:
                del host.module._modules["inlay"]
    for host in roster.hosts.values():
        host.feeds = [h for h in host.feeds if any(s.source == host.path for d in h.deltas.values() for s, _ in d)]
    for host in list(roster.hosts.values()):
        idle = not (host.deltas or host.copies or host.feeds) and host.path != ""
        adopt(host, host.features - {"forward"} if idle else host.features)
