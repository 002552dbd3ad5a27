"""The class exchange: how a host gets a say in its module's forward.

`adopt(host)` gives the module a subclass of its own class that differs in a few methods and keeps the name,
so `isinstance`, `state_dict`, parameter names, tied weights and name-based look-ups stay as they were, and
`release` puts the old class back. Subclasses are made once per class and feature set.

    forward       asks the host before and after the base's forward
    attention     keeps its class: the attention function finds the host by itself
    root          the model itself: rows are checked, prompts computed and hidden, generation prepared
    checkpoint    a checkpointed layer recomputes under the route of its forward, and only where gradients flow
    weighing      attention whose prompts are weighed by what enters it
    positions     a table of learned positions, or a rotary one, that moves on behind a prompt
    stack         an encoder that virtual tokens join;  pooler: its pooler, which must not see them
    source        the encoder of an encoder–decoder, whose input is the prompt
    parameters    names whose values an adapter may replace

Fast paths (`inlay.kernels`) are features too; `core/forward/wrappers.py` has them all, in their order.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.forward import wrappers
from inlay.core.forward.host import Host, Storage, thread
from inlay.core.prompts import prompting


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
    # An instance's forward (accelerate's hooks) is called through the host; one that was put there since calls us.
    if module.__dict__.get("_inlay_forward") is host.original_forward:
        module.__dict__.pop("_inlay_forward", None)
    later = module.__dict__.pop("forward", None)
    if later is not None and not asked:
        host.original_forward = later
    if later is host.original_forward:
        later = None
    if "checkpoint" in features:
        function = module.__dict__.pop("_gradient_checkpointing_func", None)
        if function is not None:
            module.__dict__["_inlay_checkpoint"] = function
    original: Any = host.original_class
    module.__class__ = _subclass(original, features, parameters)
    if later is not None:
        module.forward = later


def release(host: Host) -> None:
    """Put the module's own class and forward back."""
    module = host.module
    module.__dict__.pop("_inlay_host", None)
    if not getattr(type(module), "inlay_adapted", False):
        return
    module.__class__ = host.original_class
    later: Any = module.__dict__.pop("forward", None)
    if _made_here(later):
        later = getattr(later.__func__, "given", None)  # or it is the module's own, put back by somebody
    if later is not None:
        module.__dict__["forward"] = later
    if host.original_forward is not None:
        module.__dict__["forward" if later is None else "_inlay_forward"] = host.original_forward
    function = module.__dict__.pop("_inlay_checkpoint", None)
    if function is not None:
        module.__dict__["_gradient_checkpointing_func"] = function


def exchange(module: nn.Module, cls: type[nn.Module]) -> Callable[[], None]:
    """Give a module another class of its own, beneath what a host has made of it; the result gives the old one back."""
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
    if features & set(wrappers.ORDER):
        body["forward"] = _forward(cls)
        body["__setattr__"] = _set_attribute(cls, root="root" in features)
    if "root" in features and hasattr(cls, "generate"):
        body["generate"] = _generate(cls)
    if "root" in features and hasattr(cls, "enable_input_require_grads"):
        body["enable_input_require_grads"] = _leave_embeddings
    if "checkpoint" in features:
        body["_gradient_checkpointing_func"] = property(_checkpoint_function, _set_checkpoint_function)
    if "positions" in features:
        # Between the class and nn.Embedding, so that the offset a subclass adds itself is added first.
        bases = (ShiftedPositions,) if cls is nn.Embedding else (cls, ShiftedPositions)
    body |= {name: property(functools.partial(_parameter, name)) for name in parameters}
    made: type[nn.Module] = type(cls.__name__, bases, body)
    return made


def _parameter(name: str, module: nn.Module) -> Tensor | None:
    host: Host = module.__dict__["_inlay_host"]
    return host.parameter(name)


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        host: Host | None = self.__dict__.get("_inlay_host")
        inner: Callable[..., Any] = functools.partial(cls.forward, self)
        if host is None or host.inside():  # called by a forward that was put around this one and outlived the adapters
            return self.__dict__.get("_inlay_forward", inner)(*args, **kwargs)
        if host.original_forward is not None:
            inner = host.call_original
        for name, wrap in host.wrappers:
            if name not in wrappers.OFF:
                inner = functools.partial(wrap, host, inner)
        return inner(*args, **kwargs)

    forward.itself = forward  # type: ignore[attr-defined]
    return forward


def _made_here(forward: Any) -> bool:
    """Whether a forward is one of this file's; what stands around one by `functools.wraps` has its attributes, too."""
    function = getattr(forward, "__func__", forward)
    return function is not None and getattr(function, "itself", None) is function


def _set_attribute(cls: type[nn.Module], *, root: bool) -> Callable[..., None]:
    """A forward that is put in the place of an attached model's own (TRL's fused head) gets the prompts, too.

    A module's own forward put back (by accelerate, when it takes its hooks off) takes away what stood in its place.
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
    """The function that stands for `given`; it finds module and host by itself, so a copied model has its own."""
    bound = isinstance(given, types.MethodType) and given.__self__ is owner
    function = given.__func__ if bound else given

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner, host = functools.partial(function, self) if bound else function, self.__dict__.get("_inlay_host")
        return inner(*args, **kwargs) if host is None else prompting.entered(host, inner, *args, **kwargs)

    signature = inspect.signature(given)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])  # type: ignore[attr-defined]
    forward.itself, forward.given = forward, given  # type: ignore[attr-defined]
    return forward


def _generate(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.generate)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        host: Host = self.__dict__["_inlay_host"]
        with prompting.generation(host, args, kwargs):
            return cls.generate(self, *args, **kwargs)

    return generate


def _leave_embeddings(self: nn.Module) -> None:
    """transformers calls this when checkpointing is switched on, so that reentrant checkpoints of a frozen model work.

    Layers of an attached model are given an anchor instead (`_checkpointed`): were the embeddings' outputs to require
    gradients, every layer would be computed again and gradients would flow to the bottom.
    """


def _checkpoint_function(module: nn.Module) -> Callable[..., Any]:
    host: Host = module.__dict__["_inlay_host"]
    inner = module.__dict__.get("_inlay_checkpoint")
    if inner is None:
        raise AttributeError("_gradient_checkpointing_func")
    return functools.partial(_checkpointed, host, inner)


def _set_checkpoint_function(module: nn.Module, function: Callable[..., Any]) -> None:
    module.__dict__["_inlay_checkpoint"] = function


def _checkpointed(host: Host, inner: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """Run a checkpointed layer so that its recomputation, after every `use` block is left, takes the same route.

    The prompts' tensors enter as arguments: a reentrant checkpoint runs its own backward for each layer, and
    would otherwise walk the graph that made them once a layer. An empty tensor that requires gradients stands
    in for the inputs that do not, so the base's embeddings never have to. What other layers left for a delta in
    this one enters the same way; what a recomputation leaves for deltas elsewhere is dropped.
    """
    roster = host.roster
    route, call = roster.current(), roster.call.get()
    layer = _layer(function) or host.module
    inside = [h for m in layer.modules() if (h := m.__dict__.get("_inlay_host")) is not None]
    waiting = [(h, path, x) for h in inside for path, x in h.captured.get(thread(), {}).items()]
    prompts = call.tensors(host.path) if call is not None else []
    tensors = [*prompts, *(x for _, _, x in waiting)]
    flows = any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *tensors))
    prefilling = call is not None and call.capture is not None  # its keys and values outlive the layer's call
    if prefilling or (not flows and not _trains(layer, route.used)):
        return function(*args)
    anchor = torch.empty(0, requires_grad=True)
    runs = itertools.count()

    def run(_: Tensor, *given: Any) -> Any:
        again = next(runs) > 0
        for (owner, path, _x), x in zip(waiting, given[len(prompts) : len(tensors)], strict=True):
            owner.captured.setdefault(thread(), {})[path] = x
        try:
            with roster.bind(route, call and call.with_tensors(host.path, list(given[: len(prompts)]))):
                return function(*given[len(tensors) :])
        finally:
            for elsewhere in [h for feeder in inside for h in feeder.feeds] if again else ():
                elsewhere.captured.pop(thread(), None)

    return inner(run, anchor, *tensors, *args)


def _trains(layer: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether one of these adapters has something to train inside the layer."""
    stores = [m for m in layer.modules() if isinstance(m, Storage)]
    return any(p.requires_grad for s in stores for n in names if n in s for p in s[n].parameters())


def _layer(function: Any) -> nn.Module | None:
    """The layer that a checkpointed function runs: a bound method's, or the first argument of a partial forward."""
    owner = function.args[0] if isinstance(function, functools.partial) and function.args else function
    owner = getattr(owner, "__self__", owner)
    return owner if isinstance(owner, nn.Module) else None


class ShiftedPositions(nn.Embedding):
    """A table of learned positions that counts a prompt's positions too."""

    def forward(self, positions: Tensor) -> Tensor:
        host: Host = self.__dict__["_inlay_host"]
        moved = prompting.shift(host, positions)
        if moved is not positions and moved.device.type == "cpu" and not torch.compiler.is_compiling():
            last = int(moved.max())
            if last >= self.num_embeddings:
                raise UnsupportedError(
                    f"a prompt and its text reach position {last}, but {host.path} ends at {self.num_embeddings - 1}: "
                    "shorten the text or the prompt"
                )
        return super().forward(moved)
