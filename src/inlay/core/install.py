"""Installing built pieces at their hosts in the model, and removing them without a trace."""

from __future__ import annotations

from torch import nn

from inlay.core.adapted_modules import Hosts, hosts_of
from inlay.core.class_exchange import adopt, release
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.pieces import DeltaPiece, PromptPiece, SubsetPiece
from inlay.core.contracts.prompt import KeyValuePrompt, TokenPrompt
from inlay.core.contracts.subset import SummedDifference
from inlay.core.errors import UnsupportedError
from inlay.core.forward import wrappers
from inlay.core.forward.active_adapters import Roster, find_roster, held_by_others
from inlay.core.forward.chain import Chain, arranged, leaves
from inlay.core.forward.host import Host, Storage
from inlay.core.model import roles
from inlay.core.model.layer import settle_all, unsettle_all
from inlay.core.model.view import ModelView
from inlay.core.prompts.attention_function import implementation
from inlay.core.prompts.interface import put_back, swapped
from inlay.machine.precision import warn_if_slow


def install(model: nn.Module, adapter: Adapter, *, trainable: bool) -> None:
    """Install a built adapter at its hosts; if that fails, the model is as it was."""
    fresh = find_roster(model) is None
    if fresh:
        warn_if_slow(model)
    hosts = _new_hosts(model) if fresh else hosts_of(model)
    roster = hosts.roster
    features = {path: host.features for path, host in hosts.by_path.items()}
    wrapped, encoder = len(hosts.attention), roster.encoder
    try:
        if fresh:
            _enlist(hosts)
        _place(hosts, adapter)
    except BaseException:
        roster.adapters.pop(adapter.name, None)
        _remove(hosts, adapter)
        for path, host in hosts.by_path.items():
            adopt(host, features.get(path, frozenset()))
        hosts.by_path = {path: host for path, host in hosts.by_path.items() if path in features}
        roster.encoder = encoder
        put_back(hosts.attention, keep=wrapped)
        if fresh:
            _dismiss(hosts)
        raise
    elsewhere = {id(p): p.requires_grad for p in held_by_others(model, adapter)}
    for parameter in adapter.parameters():
        parameter.requires_grad_(elsewhere.get(id(parameter), trainable))
    adapter.clock = adapter.method.clock(adapter)
    roster.active = adapter.name


def uninstall(hosts: Hosts, adapter: Adapter) -> None:
    """Take an adapter out; with the last one the model is as it was before the first."""
    roster = hosts.roster
    del roster.adapters[adapter.name]
    _remove(hosts, adapter)
    if roster.active == adapter.name:
        roster.active = next(reversed(roster.adapters), None)
    if not roster.adapters:
        _dismiss(hosts)


def _new_hosts(model: nn.Module) -> Hosts:
    """The hosts and the roster of a model without adapters; the model is not touched yet."""
    for path, module in model.named_modules():
        if "_inlay_host" in module.__dict__:
            raise UnsupportedError(
                f"{path or 'this module'} belongs to another attached model; attach all adapters to the same root"
            )
    return Hosts(Roster(model), requires_grad={n: p.requires_grad for n, p in model.named_parameters()})


def _enlist(hosts: Hosts) -> None:
    """Prepare a model for its first adapter: freeze it, wrap its root and its checkpointed layers."""
    model = hosts.model
    model.requires_grad_(False)
    model.__dict__["_inlay_roster"], model.__dict__["_inlay_hosts"] = hosts.roster, hosts
    settle_all(model)
    hosts.grant("", "root")
    view = ModelView(model)
    for path, module in model.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            hosts.grant(path, "checkpoint")
        if features := wrappers.recognised(module, view):
            hosts.grant(path, *features)


def _dismiss(hosts: Hosts) -> None:
    """The inverse of `_enlist`, once no adapter is left."""
    model = hosts.model
    for host in hosts:
        release(host)
    unsettle_all(model)
    put_back(hosts.attention)
    for name in ("_inlay_roster", "_inlay_hosts"):
        model.__dict__.pop(name, None)
    _thaw(hosts)


def _thaw(hosts: Hosts) -> None:
    """Give the base's parameters back the flags they had."""
    for name, parameter in hosts.model.named_parameters():
        parameter.requires_grad_(hosts.requires_grad.get(name, parameter.requires_grad))


def _place(hosts: Hosts, adapter: Adapter) -> None:
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
                _place_delta(hosts, adapter.name, piece, arranged(deltas[piece.site.path]))
            case SubsetPiece():
                owner = hosts.model.get_submodule(piece.path)
                value = owner._parameters[piece.parameter]
                _place_parameter(hosts, adapter.name, value, piece, differences[piece.name])
            case PromptPiece():
                _place_prompt(hosts, adapter.name, piece)
    for full, held in adapter.copies.held.items():
        path, _, parameter = full.rpartition(".")
        value = hosts.model.get_submodule(path)._parameters[parameter]
        for host, own in _holders(hosts, value):
            host.copies.setdefault(adapter.name, {})[own] = held
            _store(host, adapter.name, f"copy_{own}", held)
            hosts.grant(host.path, "forward")
    hosts.roster.adapters[adapter.name] = adapter


def _place_delta(hosts: Hosts, name: str, piece: DeltaPiece, chain: Chain) -> None:
    site = piece.site
    host = hosts.grant(site.path, "forward")
    host.deltas[name] = chain
    _store(host, name, piece.label + (site.part.name if site.part else "delta"), piece.delta)
    encoder = getattr(getattr(hosts.model, "config", None), "is_encoder_decoder", False)
    if piece.delta.reads_span and encoder:
        hosts.grant(_encoder_path(ModelView(hosts.model)) or "", "source")
    for source in site.fed_by:
        feeder = hosts.grant(source, "forward")
        if host not in feeder.feeds:
            feeder.feeds.append(host)


def _place_parameter(
    hosts: Hosts, name: str, value: nn.Parameter | None, piece: SubsetPiece, same: list[SubsetPiece]
) -> None:
    assert value is not None
    alone = len(same) == 1 and piece.weight == 1
    change = piece.difference if alone else SummedDifference([(p.weight, p.difference) for p in same])
    for host, parameter in _holders(hosts, value):
        host.differences.setdefault(name, {})[parameter] = change
        if host.path == piece.path:
            _store(host, name, f"{piece.label}difference_{parameter}", piece.difference)
        hosts.grant(host.path)


def _holders(hosts: Hosts, value: nn.Parameter | None) -> list[tuple[Host, str]]:
    """Every module that holds this parameter object, tied ones included, and its name there."""
    return [
        (hosts.at(path), name)
        for path, module in ModelView(hosts.model).modules.items()
        for name, held in module._parameters.items()
        if held is value and value is not None
    ]


def _place_prompt(hosts: Hosts, name: str, piece: PromptPiece) -> None:
    """Prepare the model for a prompt; its parameters live at the root."""
    view = ModelView(hosts.model)
    root = hosts.at("")
    if isinstance(hosts.model, (nn.Sequential, nn.ModuleList)):
        raise UnsupportedError("this module has no forward of its own, so there is no text to put a prompt in front of")
    _store(root, name, piece.key, piece.prompt)
    encoder_path = _encoder_path(view)
    joins_encoder = isinstance(piece.prompt, TokenPrompt) and encoder_path is not None
    if joins_encoder:
        assert encoder_path is not None
        hosts.roster.encoder = True
        hosts.grant(encoder_path, "stack")
        if (
            "pooler" in view.modules[encoder_path]._modules
            and view.modules[encoder_path]._modules["pooler"] is not None
        ):
            hosts.grant(f"{encoder_path}.pooler" if encoder_path else "pooler", "pooler")
    else:
        weighed = isinstance(piece.prompt, KeyValuePrompt) and piece.prompt.weighed
        places = view.attention_places()
        for place in places:
            hosts.grant(place.path, "attention", *(["weighing"] if weighed else []))
        hosts.attention += swapped(view, places, implementation)
    _count_positions(hosts, view, encoder_path, needed=isinstance(piece.prompt, TokenPrompt) and not joins_encoder)


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


def _count_positions(hosts: Hosts, view: ModelView, encoder_path: str | None, *, needed: bool) -> None:
    """Make the model's position tables count virtual positions."""
    found = 0
    for path, module in view.modules.items():
        learned = roles.LEARNED_POSITIONS.fullmatch(path) is not None
        if learned and not isinstance(module, nn.Embedding):
            raise UnsupportedError(
                f"{path} ({type(module).__name__}) computes positions in a way that prompts cannot shift"
            )
        rotary = type(module).__name__.endswith("RotaryEmbedding")
        if learned or rotary:
            host = hosts.grant(path, "positions" if learned else "rotary")
            host.encoder = encoder_path is not None and (encoder_path == "" or path.startswith(encoder_path + "."))
            found += 1
    if needed and not found:
        raise UnsupportedError(
            f"{type(hosts.model).__name__} has neither a learned position table nor a rotary embedding known to "
            "inlay, so a prompt cannot be put in front of its text exactly"
        )


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


def _remove(hosts: Hosts, adapter: Adapter) -> None:
    """Remove everything of an adapter from its hosts; modules that are no hosts any more get their class back."""
    name = adapter.name
    for host in hosts:
        for owner in (host.deltas, host.differences, host.copies):
            owner.pop(name, None)
        storage = host.module._modules.get("inlay")
        if isinstance(storage, Storage) and name in storage:
            del storage[name]
            if len(storage) == 0:
                del host.module._modules["inlay"]
    for host in hosts:
        host.feeds = [
            h for h in host.feeds if any(host.path in s.fed_by for d in h.deltas.values() for s, _ in leaves(d))
        ]
    for host in hosts:
        idle = not (host.deltas or host.copies or host.feeds) and host.path != ""
        adopt(host, host.features - {"forward"} if idle else host.features)
