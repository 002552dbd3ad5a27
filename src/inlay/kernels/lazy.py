"""A tensor that is computed when something looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What can be told without computing.
_KNOWN: set[Any] = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
}  # fmt: skip


class LazyTensor(Tensor):
    """Stands for ``compute()``, in every operation and with its graph; the result is kept.

    Args:
        compute: gives the tensor.
        shape: that it will have.
        like: another tensor of its dtype and device.
    """

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> LazyTensor:
        made: LazyTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made._compute, made._value = compute, None
        return made

    def __init__(self, compute: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> None:
        """Everything is done in `__new__`, as for every subclass of Tensor."""

    def value(self) -> Tensor:
        """The tensor itself."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map_only(LazyTensor, LazyTensor.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyTensor({self.value()!r})"
