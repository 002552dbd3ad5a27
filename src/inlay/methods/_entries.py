"""A sparse difference to a parameter, and reducing an adapter's dense differences to sparse ones.

θ' = θ + d          d is zero except at k entries: indices (k) into the flattened parameter, values (k)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inlay.authoring import Adapter, Difference, SubsetPiece


class SparseDifference(Difference):
    """A difference at some entries. The forward forms the whole parameter, because the layer needs it.

    Args:
        like: the parameter.
        count: number of entries.
    """

    indices: Tensor

    def __init__(self, like: Tensor, count: int) -> None:
        super().__init__()
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.register_buffer("indices", torch.zeros(count, dtype=index_type(like), device=like.device))
        self.values = nn.Parameter(torch.zeros(count, dtype=dtype, device=like.device))

    def apply_to(self, value: Tensor) -> Tensor:
        flat, at = value.flatten(), self.indices.long()
        return flat.index_copy(0, at, (flat[at] + self.values).to(value.dtype)).view_as(value)


def index_type(like: Tensor) -> torch.dtype:
    """The narrowest integer type that can index the tensor's entries."""
    return torch.int32 if like.numel() < 2**31 else torch.int64


def differences(adapter: Adapter) -> dict[str, Difference]:
    """Parameter → the adapter's difference to it."""
    return {piece.key: piece.difference for piece in adapter.pieces if isinstance(piece, SubsetPiece)}


def thinned(adapter: Adapter, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors with each dense difference reduced to the entries in `kept`; copies stay as they are."""
    left = {name: tensor for name, tensor in adapter.tensors().items() if name.startswith("copy/")}
    for name, difference in differences(adapter).items():
        if len(kept[name]):
            dense = difference.get_parameter("difference").detach()
            left[f"difference/{name}/indices"] = kept[name].to(index_type(dense))
            left[f"difference/{name}/values"] = dense.flatten()[kept[name]]
    return left
