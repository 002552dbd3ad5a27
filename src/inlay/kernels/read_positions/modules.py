"""The modules that may compute some positions only, and what they are asked to do in a forward.

    linear layers, activations, and modules made of nothing else (a feed-forward) that are called with one tensor

A module gathers what enters it before its adapters see it, so they compute those positions too. Of modules in one
another the outermost gathers; those inside see fewer positions than the batch has and take no notice.
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
    """What the candidates of one model do while it is in force.

    Attributes:
        roster: of the model; another one may be called inside of its forward, with modules at the same paths.
    """

    roster: Roster

    def at(self, host: Host, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A candidate's forward."""
        ...


_ASKED: ContextVar[Asked | None] = ContextVar("inlay_read_positions", default=None)


@contextmanager
def asking(asked: Asked) -> Iterator[None]:
    """Put something in force for this context's forwards."""
    token = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(token)


def candidate(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that may compute some positions only."""
    asked = None if torch.compiler.is_compiling() else _ASKED.get()
    if asked is None or asked.roster is not host.roster:
        return inner(*args, **kwargs)
    return asked.at(host, inner, args, kwargs)


def only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module is called with, where that is one thing; else None."""
    if len(args) + len(kwargs) != 1:
        return None
    return args[0] if args else next(iter(kwargs.values()))


class Short:
    """Modules compute the positions that are needed of them.

    What several modules read (query, key and value) is gathered once. What leaves a module of `handed` enters another
    one and nothing else, so it is not put back between them.

    Args:
        wanted: path → the positions needed there.
        handed: paths of the modules of which only another one reads.
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
        """Raise unless everything that was handed over has arrived: then this model's calls differ from its trial."""
        if self.waiting:
            raise UnsupportedError(
                "this model's modules were not called in the order in which they were when it was tried; call "
                'inlay.fast_paths(False, "read-positions")'
            )


def is_candidate(module: nn.Module, view: ModelView) -> bool:
    """A linear layer, an activation or what is made of those, in a model of texts that returns no scores of tokens."""
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
    """Something that keeps nothing of its own and draws nothing; whether it goes entry by entry is tried."""
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
