"""Values that belong to the calling context: a thread, an asyncio task, a `with` block.

Which adapter is active must not leak from one request to another, so it lives in a `ContextVar`. Dynamo cannot trace
`ContextVar.get` and does not guard thread-locals. A compiled graph therefore reads a plain copy of the value, which it
guards, so that a change of route causes a retrace and the old route is not used. There is one such copy per model: a
compiled model runs one route at a time in the whole process.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
_BOUND: ContextVar[Mapping[int, Any]] = ContextVar("inlay_bound")


class Scoped(Generic[T]):
    """A value that is bound within a `with` block and None outside of all blocks."""

    def __init__(self) -> None:
        self.mirror: T | None = None

    def get(self) -> T | None:
        """The innermost binding in this context, or None."""
        if torch.compiler.is_compiling():
            return self.mirror
        return _BOUND.get({}).get(id(self))

    def bind(self, value: T | None) -> Binding[T]:
        """Bind `value` for a `with` block, however the block is left."""
        return Binding(self, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scoped[T]:
        """A copied model starts unbound: open blocks belong to the original."""
        return Scoped()


class Binding(Generic[T]):
    """The context manager of `Scoped.bind`; a class, because Dynamo can trace classes."""

    def __init__(self, scoped: Scoped[T], value: T | None) -> None:
        self.scoped, self.value = scoped, value
        self.before: T | None = None
        self.token: Token[Mapping[int, Any]] | None = None

    def __enter__(self) -> None:
        self.before = self.scoped.mirror
        self.scoped.mirror = self.value
        if not torch.compiler.is_compiling():
            self.token = _BOUND.set({**_BOUND.get({}), id(self.scoped): self.value})

    def __exit__(self, *exc: object) -> None:
        if self.token is not None:
            _BOUND.reset(self.token)
        self.scoped.mirror = self.before
