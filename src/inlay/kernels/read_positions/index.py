"""Some positions of a batch, taken out of a tensor and put back.

    x (rows, tokens, …) ── take ──▶ (1, n, …) ── layer ──▶ (1, n, …) ── put ──▶ (rows, tokens, …), zero elsewhere

Each is the other's gradient. If nobody reads the skipped positions, their gradient is zero; a backward pass that finds
another one there has found a reader, and raises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.core.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Index:
    """The positions of a batch that are computed.

    Attributes:
        needed: their places among all rows × tokens, ascending, (n,).
        back: place of every position in `needed`, n for those that are not in it, (rows × tokens,).
        unread: the skipped positions.
    """

    rows: int
    tokens: int
    needed: Tensor
    back: Tensor
    unread: Tensor

    @staticmethod
    def of(chosen: Tensor) -> Index:
        """The positions at which `chosen`, (rows, tokens), is true."""
        flat = chosen.flatten()
        needed = flat.nonzero().squeeze(1)
        back = torch.full((flat.numel(),), needed.numel(), device=flat.device)
        back[needed] = torch.arange(needed.numel(), device=flat.device)
        return Index(chosen.shape[0], chosen.shape[1], needed, back, flat.logical_not().nonzero().squeeze(1))

    def fits(self, x: Any) -> bool:
        """Whether x is a plain tensor on the CPU with an entry for every position of the batch."""
        return (
            type(x) is Tensor
            and x.dim() >= 3
            and x.shape[:2] == (self.rows, self.tokens)
            and x.device.type == "cpu"
            and x.is_floating_point()
        )

    def take(self, x: Tensor) -> Tensor:
        """(rows, tokens, …) → (1, n, …)."""
        made: Tensor = _Take.apply(x, self)  # type: ignore[no-untyped-call]
        return made

    def put(self, y: Tensor) -> Tensor:
        """(1, n, …) → (rows, tokens, …), zero at the skipped positions.

        Raises:
            UnsupportedError: in the backward pass, if these have a gradient.
        """
        made: Tensor = _Put.apply(y, self, True)  # type: ignore[no-untyped-call]
        return made

    def nothing(self, y: Tensor) -> Tensor:
        """Stands for `put(y)` where nobody looks at it: zeros without memory. Raises like `put`, at any position."""
        made: Tensor = _Nothing.apply(y, (self.rows, self.tokens, *y.shape[2:]))  # type: ignore[no-untyped-call]
        return made


def check(grad: Tensor) -> None:
    """Raise if the gradient of something that nobody reads is not zero.

    If it is not finite, training has diverged, and nan · 0 says nothing about readers.
    """
    size = float(torch.linalg.vector_norm(grad.detach(), dtype=torch.promote_types(grad.dtype, torch.float32)))
    if size and math.isfinite(size):
        raise UnsupportedError(
            "this model read positions that were not computed (padding, or all but the first position in its last "
            "block), so the loss of this step is wrong: when the model was tried, no output depended on them. Call "
            'inlay.fast_paths(False, "read-positions") before the first step and start again'
        )


class _Take(torch.autograd.Function):
    """See `Index.take`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Index) -> Tensor:
        ctx.index = index
        return x.flatten(0, 1).index_select(0, index.needed).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Put.apply(grads[0], ctx.index, False), None  # type: ignore[no-untyped-call]


class _Put(torch.autograd.Function):
    """See `Index.put`; `checked`: whether the skipped positions must have no gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, index: Index, checked: bool) -> Tensor:
        ctx.index, ctx.checked = index, checked
        with_rest = torch.cat([y.squeeze(0), y.new_zeros(1, *y.shape[2:])])
        return with_rest.index_select(0, index.back).view(index.rows, index.tokens, *y.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.checked:
            check(grads[0].flatten(0, 1).index_select(0, ctx.index.unread))
        return _Take.apply(grads[0], ctx.index), None, None  # type: ignore[no-untyped-call]


class _Nothing(torch.autograd.Function):
    """See `Index.nothing`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        return y.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        check(grads[0])
        return None, None
