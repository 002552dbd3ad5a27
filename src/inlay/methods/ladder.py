"""Ladder side tuning: a small network beside the frozen one, so that no gradient passes through the base.

Sung et al. 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", arXiv:2206.06522,
section 3.2. h_0 is the input of the first block, h_i the output of block i; the side network is d / reduction wide.

    s_0 = D_0 h_0                 s_i = block_i( μ_i s_{i-1} + (1 − μ_i) D_i h_i ),  μ_i = σ(α_i / T)     the rungs
    base ── frozen blocks ──╳     output head( U norm(s_L) )                         D (side, d), U (d, side)

As in the official code, the shortcut of rung i joins before side block i and reads the output of block i, D and U
have biases and PyTorch's initialisation, α starts at zero, and the head reads the side network alone (``output=
"side"``) or, the code's `merge_last`, its gated sum with the base's last state (``"both"``).

Side block i (`_side.py`) is a pre-norm transformer layer of the side width, the code's T5 scheme without its relative
positions: s + attention(norm(s)), then s + W_out f(W_in norm(s)). If the base is bidirectional (an encoder), the
attention is as published. In a decoder the side blocks are the feed-forward half only: attention would need keys and
values of its own in every cache, and the base's masks, which a delta does not get. So only the base mixes tokens, and
caches, padding and mixed batches stay exact. In an encoder–decoder the side network stands beside the decoder only;
beside the encoder it could act only through the base's cross-attention. The paper starts side blocks from the base's
weights pruned by Fisher information; these are drawn anew (its ablation's random start).

Place: the norm after the last block or, if there is none, the block's output. The side network runs after the base,
    which
records nothing for a backward pass unless something else in it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from inlay.authoring import DeltaPiece, Method, ModelView, Piece, Places, Recipe, SelectionError, UnsupportedError
from inlay.methods._bottleneck import FUNCTIONS
from inlay.methods._side import SideNetwork, SideTransformer, heads_of


@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(Method):
    """A side network; `layers` chooses the blocks that have a rung (the paper drops some).

    Attributes:
        reduction: the side network is hidden / reduction wide.
        expansion: inner size of a side block, in side widths.
        temperature: temperature of the gates.
        nonlinearity: activation of the side blocks: relu, gelu or silu.
        dropout: dropout of what the side network reads and of its output, in training.
        attention: whether side blocks attend; None means if the base is bidirectional, True refuses other bases.
        output: whether the head reads the side network alone or its gated sum with the base.
    """

    name: ClassVar[str] = "ladder"
    paper: ClassVar[str] = "arXiv:2206.06522"
    family: ClassVar[str] = "side"
    table_order: ClassVar[int] = 10
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
    attention: bool | None = None
    output: Literal["side", "both"] = "side"

    def __post_init__(self) -> None:
        self.require(
            (self.reduction >= 1, f"reduction is {self.reduction}, expected at least 1"),
            (self.expansion >= 1, f"expansion is {self.expansion}, expected at least 1"),
            (self.temperature > 0, f"temperature is {self.temperature}, expected above 0"),
            (
                self.nonlinearity in FUNCTIONS,
                f"nonlinearity is {self.nonlinearity!r}, expected one of {sorted(FUNCTIONS)}",
            ),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}, expected at least 0 and below 1"),
            (self.output in ("side", "both"), f"output is {self.output!r}, expected 'side' or 'both'"),
        )

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:

        if places.where is not None:
            raise SelectionError("method 'ladder' stands beside the whole stack, so it takes no `where`; use `layers`")
        stack = view.stack()
        numbers = range(len(stack.blocks)) if places.layers is None else sorted(set(places.layers))
        if not numbers or not set(numbers) <= set(range(len(stack.blocks))):
            raise SelectionError(f"layers are {places.layers}, expected some of 0 to {len(stack.blocks) - 1}")
        behind = (*stack.blocks[1:], stack.end.path)  # the output of block i is the input of the module after it
        read = [stack.blocks[0], *(behind[n] for n in numbers)]
        if stack.end.kind == "output" and numbers[-1] == len(stack.blocks) - 1:
            read.pop()  # nothing comes after the last block: its output is the site's own
        site = replace(stack.end, sources=tuple(read))
        heads = None if self.attention is False else heads_of(view)
        if heads is None and self.attention:
            raise UnsupportedError(
                f"method 'ladder': side attention needs a base that is known to be bidirectional, and "
                f"{type(view.model).__name__} is not; leave `attention` out, and side blocks have no attention"
            )
        if heads is None:
            return [DeltaPiece(site, SideNetwork(site, len(numbers), self))]
        return [DeltaPiece(site, SideTransformer(site, len(numbers), self, heads))]

    @classmethod
    def examples(cls) -> list[LadderSideTuning]:
        other = cls(reduction=2, expansion=2, nonlinearity="gelu", dropout=0.25, attention=False, output="both")
        return [cls(reduction=4), other]
