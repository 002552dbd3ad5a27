"""An adapter: everything one method put into one model under one name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inlay.core.method import Method
from inlay.core.pieces import DeltaPiece, Piece, PromptPiece, SubsetPiece
from inlay.core.select import Places, Where


@dataclass(eq=False)
class Adapter:
    """One attached adapter.

    Attributes:
        name: under which `use`, `save` and `detach` know it.
        method: its hyper-parameters.
        places: the user's `where` and `layers`.
        pieces: its trained modules and their places.
        copies: full parameter name → the adapter's own values (`modules_to_save`).
        modules_to_save: the module paths those belong to.
    """

    name: str
    method: Method
    places: Places
    pieces: list[Piece]
    copies: dict[str, nn.Parameter] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    @property
    def where(self) -> Where:
        """Where the adapter is, in the user's words or the method's default."""
        return self.places.where if self.places.where is not None else self.method.default_where

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the adapter under the name it is stored by.

        ``delta/<site>/<name>``, ``prompt/<key>/<name>``, ``difference/<parameter>/<name>``, ``copy/<parameter>``.
        """
        found: dict[str, Tensor] = {}
        for piece in self.pieces:
            kind, module = _module_of(piece)
            found |= {f"{kind}/{piece.key}/{n}": t for n, t in module.state_dict().items()}
        return found | {f"copy/{n}": p for n, p in self.copies.items()}

    def modules(self) -> list[nn.Module]:
        """The trained modules, in the order of the model."""
        return [_module_of(piece)[1] for piece in self.pieces]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained parameter, copies of whole modules included."""
        seen: set[int] = set()
        for module in self.modules():
            for parameter in module.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter
        yield from self.copies.values()

    @property
    def count(self) -> int:
        """Trained numbers of the method itself; a head in `modules_to_save` is not the method's."""
        return sum(p.numel() for p in self.parameters()) - self.count_copied

    @property
    def count_copied(self) -> int:
        """Trained numbers in copies of whole modules."""
        return sum(p.numel() for p in self.copies.values())

    @property
    def trainable(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    @trainable.setter
    def trainable(self, value: bool) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(value)

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes, types and values: equal digests are equal adapters."""
        return digest_of(self.tensors())


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the tensors in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _module_of(piece: Piece) -> tuple[str, nn.Module]:
    match piece:
        case DeltaPiece():
            return "delta", piece.delta
        case PromptPiece():
            return "prompt", piece.prompt
        case SubsetPiece():
            return "difference", piece.difference
