"""Building everything an adapter consists of, outside the model, and checking it before anything is installed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from inlay.core.contracts.adapter import Adapter, Copies, Held
from inlay.core.contracts.delta import Delta
from inlay.core.contracts.method import Method
from inlay.core.contracts.pieces import DeltaPiece, Piece, PromptPiece, SubsetPiece
from inlay.core.contracts.shared import shared_in
from inlay.core.errors import AdapterNameError, SelectionError, UnsupportedError, problems
from inlay.core.forward.active_adapters import find_roster, held_by_others
from inlay.core.forward.chain import arranged, check_fork
from inlay.core.model.layer import store_of
from inlay.core.model.select import Places
from inlay.core.model.view import ModelView

NAME = re.compile(r"[A-Za-z0-9_-]+")


def build(
    model: nn.Module, method: Method, *, name: str, places: Places, modules_to_save: Sequence[str] = ()
) -> Adapter:
    """Everything `attach` installs, with uninitialised parameters; the model is not touched."""
    check_free(model, name)
    view = ModelView(model)
    saved = _saved_modules(view, modules_to_save)
    pieces = method.pieces(view, places)
    pieces = _outside(pieces, saved, explicit=places.where is not None and not isinstance(places.where, str))
    _check_parts(pieces, method)
    _check_reached(view, pieces)
    _check_forks(pieces)
    copies: dict[str, Held] = {}
    for path in saved:
        packed = [p for p, m in view.modules.items() if _covered(p, [path]) and store_of(m) is not None]
        if packed:
            raise UnsupportedError(
                f"modules_to_save: {packed[0]} is quantised, so it cannot be copied and trained. Load the "
                "base without quantisation, or adapt the layer"
            )
        for parameter_name, value in _own_parameters(view, path).items():
            dtype = value.dtype if value.dtype == torch.float64 else torch.float32
            copies[parameter_name] = Held(nn.Parameter(value.detach().to(dtype, copy=True)))
    return Adapter(name, method, _storable(places, pieces, view), pieces, Copies(copies), tuple(saved))


def _own_parameters(view: ModelView, path: str) -> dict[str, nn.Parameter]:
    """The base's own parameters in a module, by full name, each once; what other adapters store there is left out."""
    inside = [(p, m) for p, m in view.modules.items() if _covered(p, [path])]
    named = [(f"{p}.{n}", v) for p, m in inside for n, v in m._parameters.items() if v is not None]
    first = {id(value): name for name, value in reversed(named)}
    return {name: value for name, value in named if first[id(value)] == name}


def check_free(model: nn.Module, name: str) -> None:
    """Raise unless an adapter of that name can be attached to the model now."""
    roster = find_roster(model)
    if not NAME.fullmatch(name):
        raise AdapterNameError(f"adapter name {name!r}: only letters, digits, '_' and '-' are allowed")
    if roster is not None and name in roster.adapters:
        raise AdapterNameError(f"adapter {name!r} is already on this model; detach it first, or choose another name")
    if roster is not None and roster.merged is not None:
        raise UnsupportedError(f"adapter {roster.merged.name!r} is merged into this model; call unmerge() first")


def initialise(
    model: nn.Module, adapter: Adapter, measured: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({})
) -> None:
    """Fill a built adapter's parameters as its paper says, then with the values measured on data, if any."""
    view = ModelView(model)
    held = {id(p) for p in held_by_others(model, adapter)}
    with torch.no_grad():
        for shared in {id(s): s for m in adapter.modules() for s in shared_in(m).values()}.values():
            if not any(id(p) in held for p in shared.parameters()):
                shared.initialise(view)
        for piece, module in zip(adapter.pieces, adapter.modules(), strict=True):
            if isinstance(piece, DeltaPiece):
                piece.delta.initialise(piece.site)
            elif isinstance(piece, PromptPiece):
                piece.prompt.initialise(view)
            state = module.state_dict()
            for name, value in measured.get(piece.key, {}).items():
                state[name].copy_(value)


def _saved_modules(view: ModelView, wanted: Sequence[str]) -> list[str]:
    found, wrong = [], []
    for word in wanted:
        paths = [first for p, first in view.names.items() if p and (p == word or p.endswith("." + word))]
        if not paths:
            wrong.append(f"{word!r} matches no module")
        elif not any(True for p in paths for _ in view.modules[p].parameters()):
            wrong.append(f"{word!r} has no parameters to train")
        found += [p for p in dict.fromkeys(paths) if p not in found]
    if wrong:
        raise SelectionError(problems("modules_to_save", wrong))
    return found


def _outside(pieces: list[Piece], saved: list[str], *, explicit: bool) -> list[Piece]:
    """Drop pieces inside modules that are trained whole anyway; raise where the user named both."""
    inside = [p for p in pieces if not isinstance(p, PromptPiece) and _covered(_path(p), saved)]
    if inside and explicit:
        raise SelectionError(problems("where", [f"{p.key} lies inside a module of modules_to_save" for p in inside]))
    left = [p for p in pieces if p not in inside]
    if inside and not left:
        raise SelectionError("where: every place lies inside a module of modules_to_save, so nothing is left to adapt")
    return left


def _covered(path: str, saved: list[str]) -> bool:
    return any(path == s or path.startswith(s + ".") for s in saved)


def _check_parts(pieces: list[Piece], method: Method) -> None:
    """The parts of a fused layer share one input, so a delta at one part must not change it."""
    changed = [
        p.key for p in pieces if isinstance(p, DeltaPiece) and p.site.part and type(p.delta).pre is not Delta.pre
    ]
    if changed:
        raise UnsupportedError(
            f"method {method.name!r} changes what enters a layer, but {', '.join(changed[:4])} shares its input with "
            "other parts of a fused matrix; adapt the whole layer, or the layer before it"
        )


def _check_reached(view: ModelView, pieces: list[Piece]) -> None:
    """PyTorch's own attention and encoder layers compute with their children's weights and never call them."""
    closed = [p for p, m in view.modules.items() if isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer))]
    unreached = [p.key for p in pieces if isinstance(p, DeltaPiece) and _covered(p.site.path, closed)]
    if unreached:
        raise UnsupportedError(
            f"{', '.join(unreached[:4])}: the torch.nn layer around it uses its weights without calling it, so an "
            "adapter there would never act; choose other places, or train its parameters with 'full' or 'top-layers'"
        )


def _check_forks(pieces: list[Piece]) -> None:
    """Deltas that stand in parallel must not see one another's output."""
    by_path: dict[str, list[DeltaPiece]] = {}
    for piece in pieces:
        if isinstance(piece, DeltaPiece) and piece.branches:
            by_path.setdefault(piece.site.path, []).append(piece)
    for path, beside in by_path.items():
        check_fork(path, arranged(beside))


def _storable(places: Places, pieces: list[Piece], view: ModelView) -> Places:
    """A predicate cannot be written to a file, so it is replaced by the sites it chose, under unambiguous names."""
    if not callable(places.where):
        return places
    names = tuple(p.key for p in pieces)
    ends = tuple(f".{name}" for name in names)
    if any(path.endswith(ends) for path in view.names if path not in names):
        return replace(places, where=re.compile("|".join(map(re.escape, names))), layers=None)
    return replace(places, where=names, layers=None)


def _path(piece: Piece) -> str:
    return piece.path if isinstance(piece, SubsetPiece) else piece.site.path if isinstance(piece, DeltaPiece) else ""
