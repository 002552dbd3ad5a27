"""A tensor that is computed when something uses it.

    state      `_value`             `_numbers`          who has used it
    made       -                    -                   nobody; size, dtype, device and the like are known (`_KNOWN`)
    numbers    -                    without a graph     code beneath Python: `__torch_dispatch__` → `numbers()`
    value      with its own graph   -                   torch's Python functions: `__torch_function__` → `value()`

States only change downwards. Beneath Python, gradients go through this tensor's own node (`_Place`), which computes the
function again in its backward pass; a value has its own graph and bypasses that node. Numbers that code beneath Python
has overwritten in place cannot become a value: that is an error. Both are computed under the `Mode` in which the tensor
was made, whoever uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.core.errors import UnsupportedError
from inlay.core.upstream import NoTorchFunction, make_wrapper_subclass, tree_map_only
from inlay.kernels import second_derivatives

# What can be answered without computing the tensor.
_KNOWN: set[Any] = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex,  # type: ignore[attr-defined]
    Tensor.__len__,
}  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """The grad mode and autocast settings at the time this was made."""

    grad: bool
    inference: bool
    device: str
    autocast: torch.dtype | None

    @staticmethod
    def now(device: torch.device) -> Mode:
        casts = device.type != "meta" and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if casts else None
        return Mode(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), device.type, dtype)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restore these settings for a block; a checkpoint around it neither stores nor counts what is saved."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.device != "meta":
                stack.enter_context(torch.autocast(self.device, self.autocast, enabled=self.autocast is not None))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same))
            yield


class LazyTensor(Tensor):
    """Stands for ``function(source)`` in every operation, with its graph; the result is computed once and kept.

    It is computed as it would have been when this object was made, with its graph even if the first use records none.
    Torch's Python functions get the result. Code beneath Python (`torch.autograd.Function`) gets its values, and this
    tensor's own place in the graph.

    Args:
        function: computes the tensor.
        source: the tensor to which its gradient flows.
        shape: the shape that the result will have.
    """

    _function: Callable[[Tensor], Tensor]
    _source: Tensor
    _mode: Mode
    _value: Tensor | None
    _numbers: Tensor | None

    @staticmethod
    def of(function: Callable[[Tensor], Tensor], source: Tensor, shape: tuple[int, ...]) -> LazyTensor:
        """Make one; arguments as in the class."""
        made: LazyTensor = _Place.apply(source, function, shape, Mode.now(source.device))  # type: ignore[no-untyped-call]
        return made

    def value(self) -> Tensor:
        """The tensor itself.

        Raises:
            UnsupportedError: code beneath Python has overwritten the values, which cannot be tracked here.
        """
        if self._value is None:
            if self._numbers is not None and not self._numbers.is_inference() and self._numbers._version:
                raise UnsupportedError(
                    "these logits were changed in place by a function with its own gradient (torch.autograd.Function) "
                    "and then used again; give that function a copy: logits.clone()"
                )
            with self._mode.again():
                self._value = self._function(self._source)
            self._numbers = None
        return self._value

    def numbers(self) -> Tensor:
        """Its values without a graph, for code that has its own backward pass, where no graph would be recorded."""
        if self._value is not None:
            return self._value.detach()
        if self._numbers is None:
            with self._mode.again():
                self._numbers = self._function(self._source.detach())
        return self._numbers

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with NoTorchFunction():
            if func in _KNOWN:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map_only(LazyTensor, LazyTensor.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyTensor({self.value()!r})"


class _Place(torch.autograd.Function):
    """A lazy tensor's own node in the graph, after its source."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, function: Any, shape: tuple[int, ...], mode: Mode) -> Tensor:
        made: LazyTensor = make_wrapper_subclass(
            LazyTensor, shape, dtype=mode.autocast or source.dtype, device=source.device
        )
        made._function, made._source, made._mode, made._value, made._numbers = function, source, mode, None, None
        ctx.save_for_backward(source)
        ctx.function, ctx.mode = function, mode
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (source,) = ctx.saved_tensors

        def function(x: Tensor) -> Tensor:
            with ctx.mode.again():
                made: Tensor = ctx.function(x)
            return made

        (found,) = second_derivatives.gradients(function, (source,), (True,), grads[0])
        return found, None, None, None


def _same(tensor: Tensor) -> Tensor:
    return tensor
