"""Ladder side tuning: a small network beside the frozen one, so that no gradient passes through the base.

Sung et al. 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", arXiv:2206.06522,
section 3.2. h_0 is what enters the first block, h_i what leaves block i; the side network is d / reduction wide.

    s_0 = D_0 h_0                 s_i = block_i( μ_i s_{i-1} + (1 − μ_i) D_i h_i ),  μ_i = σ(α_i / T)     the rungs
    base ── frozen blocks ──╳     output head( U norm(s_L) )                         D (side, d), U (d, side)

As in the official code, the shortcut of rung i joins before side block i and reads the output of block i, D and U
have biases and PyTorch's initialisation, α starts at zero, and the head reads the side network alone (``output=
"side"``) or, the code's `merge_last`, its gated sum with the base's last state (``"both"``).

Not the paper's: its side blocks are whole transformer layers, started from the base's weights pruned by Fisher
information. Ours are their feed-forward half, s + W_out f(W_in norm(s)), drawn anew (the code's T5 scheme): a token
at a time, so caches, padding and mixed batches stay exact, and what mixes tokens is the base. So an encoder-decoder's
stands beside the decoder alone; beside the encoder it could act only through the base's cross-attention.

Place: the norm behind the last block or, where there is none, its output. All of it runs when the base is done, and
the base, where nothing else is trained, records nothing for a backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.delta import Delta, cast
from inlay.core.errors import SelectionError
from inlay.core.method import Method, Recipe
from inlay.core.site import Site
from inlay.methods._bottleneck import FUNCTIONS

if TYPE_CHECKING:
    from inlay.core.pieces import Piece
    from inlay.core.select import Places
    from inlay.core.view import ModelView


@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(Method):
    """A side network; `layers` chooses the blocks that have a rung (the paper drops some).

    Attributes:
        reduction: the side network is hidden / reduction wide.
        expansion: inner size of a side block, in side widths.
        temperature: of the gates.
        nonlinearity: of the side blocks: relu, gelu or silu.
        dropout: on what the side network reads and on its output, in training.
        output: whether the head reads the side network alone or its gated sum with the base.
    """

    name: ClassVar[str] = "ladder"
    paper: ClassVar[str] = "arXiv:2206.06522"
    family: ClassVar[str] = "side"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3)  # the authors' scripts
    default_where: ClassVar[str] = "the end of the stack"
    expected_failures: ClassVar[dict[str, str]] = {
        "identity": "the side network's output takes the place of the base's from the start",
    }

    reduction: int = 8
    expansion: int = 4
    temperature: float = 0.1
    nonlinearity: str = "relu"
    dropout: float = 0.0
    output: Literal["side", "both"] = "side"

    def __post_init__(self) -> None:
        self.require(
            (self.reduction >= 1, f"reduction is {self.reduction}, expected at least 1"),
            (self.expansion >= 1, f"expansion is {self.expansion}, expected at least 1"),
            (self.temperature > 0, f"temperature is {self.temperature}, expected above 0"),
            (self.nonlinearity in FUNCTIONS, f"nonlinearity is {self.nonlinearity!r}, expected of {sorted(FUNCTIONS)}"),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}, expected at least 0 and below 1"),
            (self.output in ("side", "both"), f"output is {self.output!r}, expected 'side' or 'both'"),
        )

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        from inlay.core.pieces import DeltaPiece

        if places.where is not None:
            raise SelectionError("method 'ladder' stands beside the whole stack, so it takes no `where`; use `layers`")
        stack = view.stack()
        numbers = range(len(stack.blocks)) if places.layers is None else sorted(set(places.layers))
        if not numbers or not set(numbers) <= set(range(len(stack.blocks))):
            raise SelectionError(f"layers are {places.layers}, expected some of 0 to {len(stack.blocks) - 1}")
        behind = (*stack.blocks[1:], stack.end.path)  # what leaves block i is what enters the module behind it
        read = [stack.blocks[0], *(behind[n] for n in numbers)]
        if stack.end.kind == "output" and numbers[-1] == len(stack.blocks) - 1:
            read.pop()  # nothing stands behind the last block: its output is the site's own
        site = replace(stack.end, sources=tuple(read))
        return [DeltaPiece(site, SideNetwork(site, len(numbers), self))]

    @classmethod
    def examples(cls) -> list[LadderSideTuning]:
        return [cls(reduction=4), cls(reduction=2, expansion=2, nonlinearity="gelu", dropout=0.25, output="both")]


class SideNetwork(Delta):
    """The whole side network, at the end of the stack."""

    merges: ClassVar[bool] = False

    def __init__(self, site: Site, rungs: int, method: LadderSideTuning) -> None:
        super().__init__()
        hidden, side = site.in_features, max(site.in_features // method.reduction, 1)
        self.method, self.function = method, FUNCTIONS[method.nonlinearity]
        self.down = nn.Parameter(site.empty(1 + rungs, side, hidden))
        self.down_bias = nn.Parameter(site.empty(1 + rungs, side))
        self.gates = nn.Parameter(site.empty(rungs + (method.output == "both")))
        self.norms = nn.Parameter(site.empty(rungs + 1, side))
        self.inner = nn.Parameter(site.empty(rungs, method.expansion * side, side))
        self.outer = nn.Parameter(site.empty(rungs, side, method.expansion * side))
        self.up = nn.Parameter(site.empty(hidden, side))
        self.up_bias = nn.Parameter(site.empty(hidden))

    def initialise(self, site: Site) -> None:
        for weight, bias in ((self.down, self.down_bias), (self.up, self.up_bias)):
            bound = weight.shape[-1] ** -0.5  # nn.Linear's, for both
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        nn.init.zeros_(self.gates)
        nn.init.ones_(self.norms)
        for weight in (self.inner, self.outer):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def post(self, x: Any, y: Tensor, site: Site) -> Tensor:
        states = [*x, y] if len(x) < self.down.shape[0] else list(x)
        shares = [cast(g, y) for g in torch.sigmoid(self.gates / self.method.temperature)]
        side = self._read(0, states[0])
        for rung, state in enumerate(states[1:]):
            side = shares[rung] * side + (1 - shares[rung]) * self._read(rung + 1, state)
            inner = self.function(F.linear(self._normed(rung, side), cast(self.inner[rung], side)))
            side = side + F.linear(inner, cast(self.outer[rung], inner))
        last = F.dropout(self._normed(-1, side), self.method.dropout, self.training)
        out = F.linear(last, cast(self.up, last), cast(self.up_bias, last))
        return out if self.method.output == "side" else shares[-1] * out + (1 - shares[-1]) * y

    def _read(self, index: int, state: Tensor) -> Tensor:
        state = F.dropout(state, self.method.dropout, self.training)
        return F.linear(state, cast(self.down[index], state), cast(self.down_bias[index], state))

    def _normed(self, index: int, side: Tensor) -> Tensor:
        return F.rms_norm(side, side.shape[-1:], cast(self.norms[index], side), eps=1e-6)
