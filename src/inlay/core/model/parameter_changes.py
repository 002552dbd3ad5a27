"""Whether modules have changed, and with them whatever was computed from them and cached.

Every tensor is compared with what it was: the same object, storage and version (`Tensor._version`, by which autograd
too notices that a saved tensor was overwritten). PyTorch's fused optimizers write without counting versions, so every
step of every optimizer invalidates all that was cached. Tensors made in inference mode have no version, so nothing
computed from them is cached.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import chain, count
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

VERSION = operator.attrgetter("_version")
TRAINING = operator.attrgetter("training")
POINTER = Tensor.data_ptr


class _Steps:
    """How many steps any optimizer of this process has made."""

    made = 0

    def count(self, *_: Any) -> None:
        self.made += 1


_steps = _Steps()
register_optimizer_step_post_hook(_steps.count)


_looks = count()


def stamp(tensor: Tensor) -> tuple[int, int, int]:
    """A value that differs whenever the tensor's values may have changed."""
    if tensor.is_inference():
        return tensor.data_ptr(), -1, next(_looks)
    return tensor.data_ptr(), tensor._version, _steps.made


class Watch:
    """The parameters, buffers and modes of modules at the time they were added."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.owners: list[dict[str, Any]] = []
        self.held: list[Tensor] = []
        self.versions: list[int] = []
        self.pointers: list[int] = []
        self.steps = _steps.made

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Watch these modules themselves, without their children."""
        fresh = list(modules)
        owners = [o for m in fresh for o in (m._parameters, m._buffers) if o]
        held = _held(owners)
        self.modules += fresh
        self.owners += owners
        self.held += held
        self.versions += map(VERSION, held)
        self.pointers += map(POINTER, held)  # `p.data = other` changes the storage only

    def unchanged(self) -> bool:
        """Whether nothing has changed and all modules are in evaluation mode."""
        held = _held(self.owners)
        return (
            self.steps == _steps.made
            and len(held) == len(self.held)
            and all(map(operator.is_, held, self.held))
            and list(map(VERSION, held)) == self.versions
            and list(map(POINTER, held)) == self.pointers
            and not any(map(TRAINING, self.modules))
        )


def watchable(module: nn.Module) -> bool:
    """Whether a module is in evaluation mode and its own tensors are plain: no shards, no traced stand-ins."""
    tensors = _held([module._parameters, module._buffers])
    return not module.training and all(type(t) in (Tensor, nn.Parameter) for t in tensors) and versioned(module)


def versioned(module: nn.Module) -> bool:
    """Whether the module's own tensors count their versions; those made in inference mode do not."""
    return not any(t.is_inference() for t in _held([module._parameters, module._buffers]))


def _held(owners: Iterable[dict[str, Any]]) -> list[Tensor]:
    return [t for t in chain.from_iterable(map(dict.values, owners)) if t is not None]
