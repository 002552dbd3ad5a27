"""Compiling the blocks of a model one by one, for training: one graph serves all blocks of a kind.

    embeddings ─▶ [block] ─▶ [block] ─▶ … ─▶ norm ─▶ head, loss          [ ]: the same compiled code

A block's weights and adapters are inputs of its graph, so the graph is traced for the first block and reused for the
others; torch caches the compiled code on disk for the next process. Sizes are symbolic: batches with other numbers of
rows and other lengths do not compile again. Outside of the blocks the fast paths stay (`labelled_loss.py`); inside, the
compiler replaces them. Without gradients (evaluation, generation with its caches) a block runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from inlay.core.contracts.pieces import DeltaPiece, PromptPiece
from inlay.core.errors import UnsupportedError
from inlay.core.forward.active_adapters import find_roster
from inlay.core.model import roles
from inlay.core.model.view import ModelView
from inlay.core.upstream import call_of, compile_call, compiled_call_of

BACKEND = "inductor"
GRAPHS = 64  # limit for one kind of block: graphs differ by route, dtype, first block (no gradient to its input), …


def compile_layers(model: nn.Module, *, first: int = 0) -> Callable[[], None]:
    """Compile the blocks of a model. Each is compiled when it first runs with gradients.

    Args:
        model: with adapters or without; they may come and go, and a new one is traced when it is first used.
        first: blocks before this one are not compiled.

    Returns:
        A function that undoes it.

    Raises:
        UnsupportedError: the model has no numbered blocks, or an adapter cannot be part of a block's graph.
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
    """Why a model cannot be compiled by blocks, in words; None if it can."""
    if not blocks_of(model):
        return f"{type(model).__name__} has no numbered layers"
    roster = find_roster(model)
    for adapter in () if roster is None else roster.adapters.values():
        name = adapter.method.name
        for piece in adapter.pieces:
            if isinstance(piece, PromptPiece):
                return f"{name} has other keys and values in every layer, so each layer would need a graph of its own"
            if isinstance(piece, DeltaPiece) and piece.delta.reads_span:
                return f"{name} acts at positions that are not known inside of a layer"
            if isinstance(piece, DeltaPiece) and any(_block(p) != _block(piece.site.path) for p in piece.site.fed_by):
                return f"{name} reads the input of one layer in another"
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
    """A function that calls the block: compiled code if gradients are needed, else the block's own."""
    own = call_of(block)
    compile_: Any = torch.compile  # its declared types lack the limit
    compiled = compile_(own, dynamic=True, backend=BACKEND, recompile_limit=GRAPHS)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else own)(*args, **kwargs)

    return call
