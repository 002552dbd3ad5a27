"""Putting built pieces at their hosts in the model, and taking them out without a trace."""

from __future__ import annotations

from torch import nn

from inlay.core import prompting, roles
from inlay.core.adapted import adopt, release
from inlay.core.adapter import Adapter
from inlay.core.attention import implementation
from inlay.core.chain import Chain, arranged, leaves
from inlay.core.errors import UnsupportedError
from inlay.core.host import Host, Storage
from inlay.core.layer import settle_all, unsettle_all
from inlay.core.pieces import DeltaPiece, PromptPiece, SubsetPiece
from inlay.core.prompt import KeyValuePrompt, TokenPrompt
from inlay.core.roster import Roster, find_roster, held_by_others
from inlay.core.subset import SummedDifference
from inlay.core.view import ModelView


def install(model: nn.Module, adapter: Adapter, *, trainable: bool) -> None:
    """Put a built adapter at its hosts, or leave the model as it was."""
    there = find_roster(model)
    roster, fresh = there or _new_roster(model), there is None
    features = {path: host.features for path, host in roster.hosts.items()}
    wrapped, encoder = len(roster.attention), roster.encoder
    try:
        if fresh:
            _enlist(roster)
        _place(roster, adapter)
    except BaseException:
        roster.adapters.pop(adapter.name, None)
        _remove(roster, adapter)
        for path, host in roster.hosts.items():
            adopt(host, features.get(path, frozenset()))
        roster.hosts = {path: host for path, host in roster.hosts.items() if path in features}
        roster.encoder = encoder
        _unwrap_attention(roster, wrapped)
        if fresh:
            _dismiss(roster)
        raise
    elsewhere = {id(p): p.requires_grad for p in held_by_others(model, adapter)}
    for parameter in adapter.parameters():
        parameter.requires_grad_(elsewhere.get(id(parameter), trainable))
    adapter.clock = adapter.method.clock(adapter)
    roster.active = adapter.name


def uninstall(roster: Roster, adapter: Adapter) -> None:
    """Take an adapter out; with the last one the model is as it was before the first."""
    del roster.adapters[adapter.name]
    _remove(roster, adapter)
    if roster.active == adapter.name:
        roster.active = next(reversed(roster.adapters), None)
    if not roster.adapters:
        _dismiss(roster)


def _new_roster(model: nn.Module) -> Roster:
    """A roster for a model without adapters; the model is not touched yet."""
    for path, module in model.named_modules():
        if "_inlay_host" in module.__dict__:
            raise UnsupportedError(
                f"{path or 'this module'} belongs to another attached model; attach all adapters to the same root"
            )
    return Roster(model, requires_grad={n: p.requires_grad for n, p in model.named_parameters()})


def _enlist(roster: Roster) -> None:
    """Make a model a host of adapters: freeze it, wrap its root and its checkpointed layers."""
    roster.model.requires_grad_(False)
    roster.model.__dict__["_inlay_roster"] = roster
    settle_all(roster.model)
    grant(roster, "", "root")
    head = ModelView(roster.model).output_head if "head" in prompting.WRAPPERS else None
    for path, module in roster.model.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            grant(roster, path, "checkpoint")
        if module is head:
            grant(roster, path, "head")
        for feature in [name for name, fits in prompting.RECOGNISED.items() if fits(module)]:
            grant(roster, path, feature)


def _dismiss(roster: Roster) -> None:
    """The inverse of `_enlist`, once no adapter is left."""
    for host in roster.hosts.values():
        release(host)
    unsettle_all(roster.model)
    _unwrap_attention(roster, 0)
    roster.model.__dict__.pop("_inlay_roster", None)
    _thaw(roster)


def _unwrap_attention(roster: Roster, keep: int) -> None:
    """Give configurations back the attention they named, all but the first `keep`."""
    while len(roster.attention) > keep:
        config, original = roster.attention.pop()
        config._attn_implementation = original


def _thaw(roster: Roster) -> None:
    """Give the base's parameters back the flags they had."""
    flags = roster.requires_grad
    for name, parameter in roster.model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def _place(roster: Roster, adapter: Adapter) -> None:
    deltas: dict[str, list[DeltaPiece]] = {}
    differences: dict[str, list[SubsetPiece]] = {}
    for piece in adapter.pieces:
        if isinstance(piece, DeltaPiece):
            deltas.setdefault(piece.site.path, []).append(piece)
        elif isinstance(piece, SubsetPiece):
            differences.setdefault(piece.name, []).append(piece)
    for piece in adapter.pieces:
        match piece:
            case DeltaPiece():
                _place_delta(roster, adapter.name, piece, arranged(deltas[piece.site.path]))
            case SubsetPiece():
                owner = roster.model.get_submodule(piece.path)
                value = owner._parameters[piece.parameter]
                _place_parameter(roster, adapter.name, value, piece, differences[piece.name])
            case PromptPiece():
                _place_prompt(roster, adapter.name, piece)
    for full, held in adapter.copies.held.items():
        path, _, parameter = full.rpartition(".")
        value = roster.model.get_submodule(path)._parameters[parameter]
        for host, own in _holders(roster, value):
            host.copies.setdefault(adapter.name, {})[own] = held
            _store(host, adapter.name, f"copy_{own}", held)
            grant(roster, host.path, "forward")
    roster.adapters[adapter.name] = adapter


def _place_delta(roster: Roster, name: str, piece: DeltaPiece, chain: Chain) -> None:
    site = piece.site
    host = grant(roster, site.path, "forward")
    host.deltas[name] = chain
    _store(host, name, piece.label + (site.part.name if site.part else "delta"), piece.delta)
    encoder = getattr(getattr(roster.model, "config", None), "is_encoder_decoder", False)
    if piece.delta.reads_span and encoder:
        grant(roster, _encoder_path(ModelView(roster.model)) or "", "source")
    for source in site.fed_by:
        feeder = grant(roster, source, "forward")
        if host not in feeder.feeds:
            feeder.feeds.append(host)


def _place_parameter(
    roster: Roster, name: str, value: nn.Parameter | None, piece: SubsetPiece, same: list[SubsetPiece]
) -> None:
    assert value is not None
    alone = len(same) == 1 and piece.weight == 1
    change = piece.difference if alone else SummedDifference([(p.weight, p.difference) for p in same])
    for host, parameter in _holders(roster, value):
        host.differences.setdefault(name, {})[parameter] = change
        if host.path == piece.path:
            _store(host, name, f"{piece.label}difference_{parameter}", piece.difference)
        grant(roster, host.path)


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
        grant(roster, encoder_path, "stack")
        if (
            "pooler" in view.modules[encoder_path]._modules
            and view.modules[encoder_path]._modules["pooler"] is not None
        ):
            grant(roster, f"{encoder_path}.pooler" if encoder_path else "pooler", "pooler")
    else:
        weighed = isinstance(piece.prompt, KeyValuePrompt) and piece.prompt.weighed
        for place in view.attention_places():
            grant(roster, place.path, "attention", *(["weighing"] if weighed else []))
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
        raise UnsupportedError(
            f"{type(model).__name__} has no token embeddings, so no virtual tokens can join its input"
        )
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
            host = grant(roster, path, "positions" if learned else "rotary")
            host.encoder = encoder_path is not None and (encoder_path == "" or path.startswith(encoder_path + "."))
            found += 1
    if needed and not found:
        raise UnsupportedError(
            f"the positions of {type(roster.model).__name__} are in none of the known places (learned table, rotary "
            "embedding), so a prompt cannot be put in front of its text exactly"
        )


def _host(roster: Roster, path: str) -> Host:
    host = roster.hosts.get(path)
    if host is None:
        host = roster.hosts[path] = Host(roster, path, roster.model.get_submodule(path))
        host.by_row = _sees_rows(roster.model, path, host.module)
        host.pooled = roles.layer_of(path) is None or not hasattr(roster.model, "config")
    return host


def _sees_rows(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether a module's input is a batch of rows: not an expert's chosen tokens, not a table of positions."""
    if isinstance(module, nn.Embedding):
        table = ModelView(model).input_embedding
        return table is None or module._parameters["weight"] is table._parameters["weight"]
    return roles.EXPERT.fullmatch(path) is None


def grant(roster: Roster, path: str, *features: str) -> Host:
    """Give the host at `path` more to say in its module."""
    host = _host(roster, path)
    adopt(host, host.features | set(features))
    return host


def revoke(roster: Roster, path: str, *features: str) -> None:
    """The inverse of `grant`; a host that is gone has nothing left to give back."""
    if path in roster.hosts:
        host = roster.hosts[path]
        adopt(host, host.features - set(features))


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
    slot[key.replace(".", "_").replace("/", "_")] = trained
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
        host.feeds = [
            h for h in host.feeds if any(host.path in s.fed_by for d in h.deltas.values() for s, _ in leaves(d))
        ]
    for host in list(roster.hosts.values()):
        idle = not (host.deltas or host.copies or host.feeds) and host.path != ""
        adopt(host, host.features - {"forward"} if idle else host.features)
