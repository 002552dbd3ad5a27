"""The class exchange: how a host gets a say in its module's forward.

`adopt(host)` gives the module a subclass of its own class that differs in a few methods and keeps the name,
so `isinstance`, `state_dict`, parameter names, tied weights and name-based look-ups stay as they were, and
`release` puts the old class back. Subclasses are made once per class and feature set.

    forward       asks the host before and after the base's forward
    attention     keeps its class: the attention function finds the host by itself
    root          the model itself: rows are checked, prompts computed and hidden, generation prepared
    checkpoint    a checkpointed layer recomputes under the route of its forward, and only where gradients flow
    weighing      attention whose input decides how much each prompt pair counts
    positions     a learned position table, whose positions shift behind a prompt;  rotary: the other kind
    stack         an encoder that virtual tokens join;  pooler: its pooler, which must not see them
    source        the encoder of an encoder–decoder, in front of whose input the prompt stands
    parameters    names whose values an adapter may replace

Fast paths (`inlay.kernels`) are features too; `core/forward/wrappers.py` lists all of them in order.

An instance may carry a forward, before we come or from then on: accelerate's hooks, mixed precision, TRL's fused head.
Where the subclass has a forward of ours it is in one of these states (▶ calls):

    state            `forward` in __dict__   host.original_forward   module(…) runs
    plain            -                       None                    ours ▶ the class's
    own              -                       own                     ours ▶ own ▶ the class's
    put later        later                   None                    later ▶ ours ▶ the class's
    own, put later   later                   own                     later ▶ ours ▶ own ▶ the class's
    let go           later                   (no host)               later ▶ ours, which steps aside ▶ the class's, or
                                                                     own, kept for that as `_inlay_forward`

    adopt, for the first time       what the instance has becomes *own*; none: *plain*
    adopt again                     the state stays, whatever adapters come and go
    module.forward = f              *put later*; an earlier one is f's own affair. At the root f is entered with the
                                    prompts (`_patched`), because it may be meant to replace the model's own
    … = ours, or the class's        *put back*: takes away what was put later, else own; the class's at the root is
                                    an f like any other
    release                         own returns to `forward`; with a later one: *let go*, which adopt takes for own

A subclass without a forward of ours (checkpoint, parameters, tables that are more than an `nn.Embedding`) leaves the
instance's where it is.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.forward import wrappers
from inlay.core.forward.checkpointing import checkpoint_function, leave_embeddings, set_checkpoint_function
from inlay.core.forward.host import Host
from inlay.core.prompts import virtual_positions
from inlay.core.upstream import CHECKPOINTS_BY


def adopt(host: Host, features: frozenset[str]) -> None:
    """Give the host's module the subclass that has `features`, or its own class back if there are none."""
    module = host.module
    asked = _made_here(type(module).forward)
    release(host)
    host.features = features
    host.wrappers = wrappers.among(features)
    parameters = host.replaced
    if features or parameters:
        module.__dict__["_inlay_host"] = host
    if not features - {"attention"} and not parameters:
        return
    original: Any = host.original_class
    made = _subclass(original, features, parameters)
    later = None
    if _made_here(made.forward):
        later = _take_forward(host, asked=asked)
    if "checkpoint" in features:
        function = module.__dict__.pop(CHECKPOINTS_BY, None)
        if function is not None:
            module.__dict__["_inlay_checkpoint"] = function
    module.__class__ = made
    if later is not None:
        module.forward = later


def _take_forward(host: Host, *, asked: bool) -> Any:
    """Take the instance's own forward to the host; what was put there later is returned, to be put there again.

    Args:
        asked: whether ours was there before, so that what is found was put there later, unless it is the host's.
    """
    held = host.module.__dict__
    if asked and held.get("_inlay_forward") is host.original_forward:
        held.pop("_inlay_forward", None)
    found = held.pop("forward", None)
    if not asked:
        host.original_forward = found
    return None if found is host.original_forward else found


def release(host: Host) -> None:
    """Put the module's own class and forward back."""
    module = host.module
    module.__dict__.pop("_inlay_host", None)
    if not getattr(type(module), "inlay_adapted", False):
        return
    asked = _made_here(type(module).forward)
    module.__class__ = host.original_class
    if asked:
        _put_forward_back(host)
    function = module.__dict__.pop("_inlay_checkpoint", None)
    if function is not None:
        module.__dict__[CHECKPOINTS_BY] = function


def _put_forward_back(host: Host) -> None:
    module = host.module
    later: Any = module.__dict__.pop("forward", None)
    if _made_here(later):
        later = getattr(later.__func__, "given", None)  # or somebody has put the module's own forward back
    if later is not None:
        module.__dict__["forward"] = later
    if host.original_forward is not None:
        module.__dict__["forward" if later is None else "_inlay_forward"] = host.original_forward


def exchange(module: nn.Module, cls: type[nn.Module]) -> Callable[[], None]:
    """Change a module's own class, beneath the one its host has given it; the returned function undoes it."""
    host: Host | None = module.__dict__.get("_inlay_host")
    old = type(module) if host is None else host.original_class
    _put_class(module, cls)
    return functools.partial(_put_class, module, old)


def _put_class(module: nn.Module, wanted: type[nn.Module]) -> None:
    host: Host | None = module.__dict__.get("_inlay_host")
    if host is not None:
        host.original_class = wanted
    if host is None or not getattr(type(module), "inlay_adapted", False):
        module.__class__ = wanted
    else:
        adopt(host, host.features)


@functools.cache
def _subclass(cls: Any, features: frozenset[str], parameters: frozenset[str]) -> type[nn.Module]:
    body: dict[str, Any] = {
        "inlay_adapted": True,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    bases: tuple[type, ...] = (cls,)
    moves = "positions" in features and cls is nn.Embedding
    asks = moves or bool(features & set(wrappers.ORDER))
    if asks:
        body["forward"] = _forward(cls, moves=moves)
        body["__setattr__"] = _set_attribute(cls, root="root" in features)
    if "root" in features and hasattr(cls, "generate"):
        body["generate"] = _generate(cls)
    if "root" in features and hasattr(cls, "enable_input_require_grads"):
        body["enable_input_require_grads"] = leave_embeddings
    if "checkpoint" in features:
        body[CHECKPOINTS_BY] = property(checkpoint_function, set_checkpoint_function)
    if "positions" in features and not moves:
        bases = (cls, ShiftedPositions)  # between the two, so that an offset which a subclass adds is added first
    body |= {name: property(functools.partial(_parameter, name)) for name in parameters}
    made: Any = type(cls.__name__, bases, body)
    if asks:  # transformers' layers wrap every subclass's forward, so that is the one to know again
        made.forward.itself = made.forward
    return made  # type: ignore[no-any-return]


def _parameter(name: str, module: nn.Module) -> Tensor | None:
    host: Host = module.__dict__["_inlay_host"]
    return host.parameter(name)


def _forward(cls: type[nn.Module], *, moves: bool) -> Callable[..., Any]:
    """Ours for a class.

    Args:
        moves: whether what enters are positions, which a prompt moves for all that stands inside.
    """

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        host: Host | None = self.__dict__.get("_inlay_host")
        inner: Callable[..., Any] = functools.partial(cls.forward, self)
        if host is None or host.inside():  # a forward wrapped around this one has outlived the adapters and calls it
            return self.__dict__.get("_inlay_forward", inner)(*args, **kwargs)
        if host.original_forward is not None:
            inner = host.call_original
        if moves:
            args = (_moved(host, args[0]), *args[1:])
        for name, wrap in host.wrappers:
            if name not in wrappers.OFF:
                inner = functools.partial(wrap, host, inner)
        return inner(*args, **kwargs)

    return forward


def _made_here(forward: Any) -> bool:
    """Whether this file made a forward itself: a wrapper around one has its attributes too, by `functools.wraps`."""
    function = getattr(forward, "__func__", forward)
    return function is not None and getattr(function, "itself", None) is function


def _set_attribute(cls: type[nn.Module], *, root: bool) -> Callable[..., None]:
    """A `__setattr__` through which a forward that replaces an attached model's own (TRL's fused head) gets the prompts
    too.

    When the module's own forward is set again (accelerate removing its hooks), the replacement is dropped.
    """

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if name == "forward" and isinstance(value, types.MethodType) and value.__self__ is self:
            ours = _made_here(value) and not hasattr(value, "given")
            if ours or (value.__func__ is cls.forward and not root):
                if self.__dict__.pop("forward", None) is None:
                    self.__dict__["_inlay_host"].original_forward = None
                return
        if name == "forward" and root and callable(value):
            value = types.MethodType(_patched(value, self), self)
        cls.__setattr__(self, name, value)

    return __setattr__


def _patched(given: Any, owner: nn.Module) -> Callable[..., Any]:
    """A function in place of `given` that finds its module and host itself, so that it works in a copied model."""
    bound = isinstance(given, types.MethodType) and given.__self__ is owner
    function = given.__func__ if bound else given

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner, host = functools.partial(function, self) if bound else function, self.__dict__.get("_inlay_host")
        return inner(*args, **kwargs) if host is None else virtual_positions.entered(host, inner, *args, **kwargs)

    signature = inspect.signature(given)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])  # type: ignore[attr-defined]
    forward.itself, forward.given = forward, given  # type: ignore[attr-defined]
    return forward


def _generate(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.generate)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        host: Host = self.__dict__["_inlay_host"]
        with virtual_positions.generation(host, args, kwargs):
            return cls.generate(self, *args, **kwargs)

    return generate


class ShiftedPositions(nn.Embedding):
    """What a position table that is more than an `nn.Embedding` calls as its `super().forward`."""

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(_moved(self.__dict__["_inlay_host"], positions))


def _moved(host: Host, positions: Tensor) -> Tensor:
    """A table's positions, behind the prompt.

    Raises:
        UnsupportedError: the table is too short for them; on the CPU, where looking costs nothing.
    """
    moved = virtual_positions.shift(host, positions)
    if moved is not positions and moved.device.type == "cpu" and not torch.compiler.is_compiling():
        last, size = int(moved.max()), host.module.num_embeddings
        if last >= size:  # type: ignore[operator]
            raise UnsupportedError(
                f"a prompt and its text reach position {last}, but {host.path} ends at {size - 1}: "  # type: ignore[operator]
                "shorten the text or the prompt"
            )
    return moved
