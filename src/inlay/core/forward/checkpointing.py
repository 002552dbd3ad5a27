"""Gradient checkpointing of an attached model: a layer is recomputed under the route of its forward.

A checkpointed layer's `_gradient_checkpointing_func` is a property of its class while adapters are attached
(`core/class_exchange.py`), so whatever transformers puts there runs inside of what stands here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.forward.host import Host, Storage, thread
from inlay.core.upstream import CHECKPOINTS_BY


def leave_embeddings(self: nn.Module) -> None:
    """transformers calls this when checkpointing is switched on, so that reentrant checkpoints of a frozen model work.

    Layers of an attached model get an anchor instead (`_checkpointed`): if the embeddings' outputs required gradients,
    every layer would be computed again and gradients would flow to the bottom.
    """


def checkpoint_function(module: nn.Module) -> Callable[..., Any]:
    host: Host = module.__dict__["_inlay_host"]
    inner = module.__dict__.get("_inlay_checkpoint")
    if inner is None:
        raise AttributeError(CHECKPOINTS_BY)
    return functools.partial(_checkpointed, host, inner)


def set_checkpoint_function(module: nn.Module, function: Callable[..., Any]) -> None:
    module.__dict__["_inlay_checkpoint"] = function


def _checkpointed(host: Host, inner: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """Run a checkpointed layer so that its recomputation, after every `use` block is left, takes the same route.

    The prompts' tensors are passed as arguments: a reentrant checkpoint runs its own backward for each layer, and
    would otherwise walk the graph that made them once per layer. Where no input requires gradients, an empty tensor
    that does is passed along, so that the base's embeddings need not require any. What other layers captured for a
    delta in this one is passed the same way; what a recomputation captures for deltas elsewhere is dropped.
    """
    roster = host.roster
    route, call = roster.current(), roster.call.get()
    layer = _layer(function) or host.module
    inside = [h for m in layer.modules() if (h := m.__dict__.get("_inlay_host")) is not None]
    waiting = [(h, path, x) for h in inside for path, x in h.captured.get(thread(), {}).items()]
    prompts = call.tensors(host.path) if call is not None else []
    tensors = [*prompts, *(x for _, _, x in waiting)]
    flows = any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *tensors))
    prefilling = call is not None and call.capture is not None  # its keys and values are kept after the layer's call
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
    """The layer that a checkpointed function runs: the owner of a bound method, or a partial's first argument."""
    owner = function.args[0] if isinstance(function, functools.partial) and function.args else function
    owner = getattr(owner, "__self__", owner)
    return owner if isinstance(owner, nn.Module) else None
