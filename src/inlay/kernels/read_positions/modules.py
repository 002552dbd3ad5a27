"""The modules that can compute some positions only, and what they are asked to do in a forward.

    linear layers, activations, and modules made of nothing else (a feed-forward), if called with a single tensor

A module gathers its input before its adapters see it, so these compute fewer positions too. Of nested modules the
outermost one gathers; the inner ones see fewer positions than the batch has, and change nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.forward.active_adapters import Roster
from inlay.core.forward.host import Host
from inlay.core.model.layer import shape_of
from inlay.core.model.view import ModelView
from inlay.kernels.dropout import DROPOUTS
from inlay.kernels.read_positions.index import Index

FEATURE = "read-positions"


class Asked(Protocol):
    """What the candidates of one model do during a forward.

    Attributes:
        roster: the model's; a second model may run inside this one's forward, with modules at the same paths.
    """

    roster: Roster

    def at(self, host: Host, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A candidate's forward."""
        ...


_ASKED: ContextVar[Asked | None] = ContextVar("inlay_read_positions", default=None)


@contextmanager
def asking(asked: Asked) -> Iterator[None]:
    """Let candidates do this in the forwards of this context."""
    token = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(token)


def asked_already(roster: Roster) -> bool:
    """Whether a forward of this model is under way in this context, for which something is asked."""
    asked = _ASKED.get()
    return asked is not None and asked.roster is roster


def candidate(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that can skip positions."""
    asked = None if torch.compiler.is_compiling() else _ASKED.get()
    if asked is None or asked.roster is not host.roster:
        return inner(*args, **kwargs)
    return asked.at(host, inner, args, kwargs)


def only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The only argument of a call; None if there are several."""
    if len(args) + len(kwargs) != 1:
        return None
    return args[0] if args else next(iter(kwargs.values()))


class Short:
    """Modules compute only the positions that are needed of them.

    The input that several modules share (query, key and value) is gathered once. The output of a module in `handed` is
    the input of another one and is used nowhere else, so it goes there as it is, without being put back in between.

    Args:
        wanted: path → the positions needed there.
        handed: paths of modules whose output only another module reads.
    """

    def __init__(self, roster: Roster, wanted: Mapping[str, Index], handed: Collection[str]) -> None:
        self.roster, self.wanted, self.handed = roster, wanted, handed
        self.source: Tensor | None = None
        self.state: tuple[Any, ...] = ()
        self.taken: Tensor | None = None
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, host: Host, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self.wanted.get(host.path)
        x = only(args, kwargs)
        if index is None or not index.fits(x):
            return inner(*args, **kwargs)
        _, entering = self.waiting.pop(id(x), (None, None))
        if entering is None:
            entering = self._of(x, index)
        y = inner(entering) if args else inner(**{next(iter(kwargs)): entering})
        if host.path not in self.handed:
            return index.put(y)
        stand_in = index.nothing(y)
        self.waiting[id(stand_in)] = stand_in, y
        return stand_in

    def _of(self, x: Tensor, index: Index) -> Tensor:
        state = (id(index), -1 if x.is_inference() else x._version, torch.is_grad_enabled())
        if self.taken is None or self.source is not x or self.state != state:
            self.source, self.state, self.taken = x, state, index.take(x)
        return self.taken

    def finish(self) -> None:
        """Raise if an output that was handed over never arrived."""
        if self.waiting:
            raise UnsupportedError(
                "this model called its modules in another order than when it was tried, so its output is wrong; call "
                'inlay.fast_paths(False, "read-positions")'
            )


def is_candidate(module: nn.Module, view: ModelView) -> bool:
    """A linear layer, an activation, or a module made of these, in a text model without scores over the vocabulary."""
    config: Any = view.config
    return (
        module is not view.model
        and view.output_head is None
        and not getattr(config, "is_encoder_decoder", False)
        and "attention_mask" in parameters(type(view.model).forward)
        and (_linear(module) or _activation(module) or _made_of_them(module))
    )


@lru_cache(maxsize=64)
def parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments of a class's forward, in order."""
    found = inspect.signature(inspect.unwrap(forward)).parameters.values()
    return tuple(p.name for p in found if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


def _linear(module: nn.Module) -> bool:
    shape = shape_of(module)
    return shape is not None and shape.kind == "linear"


def _activation(module: nn.Module) -> bool:
    """A module that holds nothing and is no dropout; whether it works position by position is tried."""
    holds = module._parameters or module._buffers or module._modules
    return not holds and not isinstance(module, (*DROPOUTS, nn.Identity))


def _made_of_them(module: nn.Module) -> bool:
    inside = [m for m in module.modules() if m is not module]
    parts = [m for m in inside if _linear(m) or not m._modules]
    return (
        not (module._parameters or module._buffers)
        and any(map(_linear, parts))
        and all(_linear(m) or _activation(m) for m in parts)
        and not any(m._parameters or m._buffers for m in inside if m._modules and not _linear(m))
    )
