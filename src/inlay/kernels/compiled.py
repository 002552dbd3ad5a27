"""The blocks of a stack compiled one by one, for training: one graph serves all blocks of a kind.

    embeddings ─▶ [block] ─▶ [block] ─▶ … ─▶ norm ─▶ head, loss          [ ]: the same compiled code

A block's weights and adapters are inputs of its graph, so that it is traced for the first block and found again for
the others; torch keeps what it compiled on disk, for the next process. Sizes are symbols: batches of other rows and
lengths do not compile again. What lies outside of the blocks keeps its fast paths (`labelled_head.py`); inside, the
compiler takes their place. Without gradients (evaluation, generation with its caches) a block runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from inlay.core.contracts.pieces import DeltaPiece, PromptPiece
from inlay.core.errors import UnsupportedError
from inlay.core.forward.roster import find_roster
from inlay.core.model import roles
from inlay.core.model.view import ModelView
from inlay.core.upstream import call_of, compile_call, compiled_call_of

BACKEND = "inductor"
GRAPHS = 64  # of one kind of block: a route, a dtype, the first block (nothing flows to its input), …


def compile_layers(model: nn.Module, *, first: int = 0) -> Callable[[], None]:
    """Compile the blocks of a model; it happens when each first runs with gradients.

    Args:
        model: attached or not; adapters may come and go, another one is traced when it is first used.
        first: blocks before this one stay as they are.

    Returns:
        What gives the blocks their own code back.

    Raises:
        UnsupportedError: no numbered blocks, or an adapter that no graph of a block can serve.
    """
    if why := refusal(model):
        raise UnsupportedError(f"layers cannot be compiled one by one: {why}")
    blocks = blocks_of(model)[first:]
    before = [compiled_call_of(block) for block in blocks]
    for block in blocks:
        compile_call(block, _compiled(block))

    def undo() -> None:
        for block, call in zip(blocks, before, strict=True):
            compile_call(block, call)

    return undo


def refusal(model: nn.Module) -> str | None:
    """What stands against it, in words."""
    if not blocks_of(model):
        return f"{type(model).__name__} has no list of numbered layers"
    roster = find_roster(model)
    for adapter in () if roster is None else roster.adapters.values():
        name = adapter.method.name
        for piece in adapter.pieces:
            if isinstance(piece, PromptPiece):
                return f"{name} gives every layer keys and values of its own, so each would be compiled by itself"
            if isinstance(piece, DeltaPiece) and piece.delta.reads_span:
                return f"{name} acts at positions that are known outside of the layers only"
            if isinstance(piece, DeltaPiece) and any(_block(p) != _block(piece.site.path) for p in piece.site.fed_by):
                return f"{name} reads in one layer what entered another"
    return None


def blocks_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The numbered blocks of all stacks, in order."""
    modules = ModelView(model).modules
    return tuple(
        module
        for path, module in modules.items()
        if _block(path) == path and isinstance(modules.get(path.rpartition(".")[0]), nn.ModuleList)
    )


def _block(path: str) -> str | None:
    """The path of the block that a module lies in."""
    at = roles.layer_of(path)
    return None if at is None else f"{at[0]}.{at[1]}" if at[0] else str(at[1])


def _compiled(block: nn.Module) -> Callable[..., Any]:
    """What a block is called through: compiled code where gradients are wanted."""
    own = call_of(block)
    compile_: Any = torch.compile  # its stated types lack the limit
    compiled = compile_(own, dynamic=True, backend=BACKEND, recompile_limit=GRAPHS)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else own)(*args, **kwargs)

    return call
