"""Sums of differences to the base's parameters with different structures: other masks, other layers, other methods.

The nonzero entries become a finished sparse difference, as of LT-SFT, whose paper is about composing such differences
by addition (arXiv:2110.07560).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from inlay.core.build import build
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.pieces import SubsetPiece
from inlay.core.errors import UnsupportedError
from inlay.core.model.select import Places
from inlay.core.model.view import ModelView
from inlay.methods.full import parameter_names
from inlay.methods.lt_sft import LTSFT


def only_differences(adapters: Sequence[Adapter]) -> bool:
    return all(isinstance(piece, SubsetPiece) for adapter in adapters for piece in adapter.pieces)


def parameters_of(model: nn.Module, adapters: Sequence[Adapter]) -> list[str]:
    """The parameters that any of the adapters changes, in the order of the model."""
    changed = {piece.key for adapter in adapters for piece in adapter.pieces}
    return [name for name in parameter_names(ModelView(model)) if name in changed]


def as_sparse(model: nn.Module, changes: Mapping[str, Tensor], name: str, saved: Sequence[str]) -> Adapter:
    """An adapter with these changes.

    Raises:
        UnsupportedError: the changes are zero everywhere.
    """
    at = {key: change.flatten().nonzero()[:, 0] for key, change in changes.items()}
    counts = {key: len(places) for key, places in at.items() if len(places)}
    if not counts:
        raise UnsupportedError("the sum is zero, so there is no adapter to make; choose other weights")
    target = build(model, LTSFT(chosen=counts), name=name, places=Places(), modules_to_save=saved)
    for piece in target.pieces:
        assert isinstance(piece, SubsetPiece)
        values = piece.difference.get_parameter("values")
        values.copy_(changes[piece.key].flatten()[at[piece.key]])
        piece.difference.get_buffer("indices").copy_(at[piece.key])
    return target
