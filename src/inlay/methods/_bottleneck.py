"""Shared by the bottleneck adapters: two projections with a nonlinearity between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import Delta, Grouped, Method, Site, cast
from inlay.kernels.grouped import Bottlenecks

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def check_sizes(method: Method, size: str) -> None:
    """Raise unless the field `size` is positive and the nonlinearity known."""
    fields = method.to_dict()
    value, nonlinearity = fields[size], fields["nonlinearity"]
    method.require(
        (value >= 1, f"{size} is {value}, expected at least 1"),
        (nonlinearity in FUNCTIONS, f"nonlinearity is {nonlinearity!r}, expected one of {sorted(FUNCTIONS)}"),
    )


class BottleneckDelta(Delta):
    """y + scale · W_up f(W_down input + b_down) + b_up, where the input is the sublayer's output or its input.

    Args:
        size: inner size of the bottleneck.
        beside: True if the adapter reads the sublayer's input (parallel), False if it reads its output (serial).
        fill: initialises (down, up) as the paper does; biases start at zero.
    """

    merges: ClassVar[bool] = False

    def __init__(
        self, site: Site, size: int, nonlinearity: str, fill: Callable[[Tensor, Tensor], object],
        *, scale: float = 1.0, beside: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        entering = site.in_features if beside else site.out_features
        self.function, self.scale, self.beside, self.fill = FUNCTIONS[nonlinearity], scale, beside, fill
        self.down = nn.Parameter(site.empty(size, entering))  # (size, in)
        self.down_bias = nn.Parameter(site.empty(size))
        self.up = nn.Parameter(site.empty(site.out_features, size))  # (out, size)
        self.up_bias = nn.Parameter(site.empty(site.out_features))

    def initialise(self, site: Site) -> None:
        self.fill(self.down, self.up)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y.add(self.added(x if self.beside else y), alpha=self.scale)

    def added(self, entering: Tensor) -> Tensor:
        """The bottleneck's output for its input: (..., in) → (..., out)."""
        inner = self.function(F.linear(entering, cast(self.down, entering), cast(self.down_bias, entering)))
        return F.linear(inner, cast(self.up, inner), cast(self.up_bias, inner))

    @classmethod
    def grouped(cls, deltas: Sequence[Self], site: Site, dtype: torch.dtype) -> Grouped | None:
        first = deltas[0]
        if any((d.function, d.beside) != (first.function, first.beside) for d in deltas):
            return None
        return Bottlenecks(
            [d.down for d in deltas], [d.down_bias for d in deltas], [d.up for d in deltas],
            [d.up_bias for d in deltas], [d.scale for d in deltas], first.function, dtype, beside=first.beside,
        )  # fmt: skip
