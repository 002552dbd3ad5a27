"""A member of a composition: its pieces within the whole adapter, and its share of the adapter.

    member 1's piece      label "…"      parameters' names "…"
    in the composition    label "1/…"    parameters' names "1/…"     the branch of a chain that it stands on, if any

A member's clock, and what it stores, see an adapter with the member's own method and pieces, under the names they have
when the method is used alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from torch import Tensor

from inlay.authoring import (
    Adapter,
    Branch,
    Clock,
    DeltaPiece,
    Method,
    ModelView,
    Piece,
    Places,
    PromptPiece,
    Shared,
    SubsetPiece,
    kind_and_module,
    shared_in,
)

if TYPE_CHECKING:
    from inlay.methods._composition import Composition


def pieces_of(method: Method, number: int, branch: Branch | None, view: ModelView, places: Places) -> list[Piece]:
    """A member's pieces, labelled as pieces of the composition."""
    inside = method.pieces(view, places)
    for shared in _shared(inside):
        shared.key = f"{number}/{shared.key}"
    return [_labelled(piece, number, branch) for piece in inside]


def _shared(pieces: Sequence[Piece]) -> list[Shared]:
    modules = [kind_and_module(piece)[1] for piece in pieces]
    return list({id(s): s for m in modules for s in shared_in(m).values()}.values())


def _labelled(piece: Piece, number: int, branch: Branch | None) -> Piece:
    """A member's piece, labelled as a piece of the composition."""
    label = f"{number}/"
    match piece:
        case DeltaPiece():
            inner = tuple(replace(b, fork=label + b.fork) for b in piece.branches)
            outer = () if branch is None else (branch,)
            return replace(piece, label=label + piece.label, branches=outer + inner)
        case SubsetPiece():
            weight = piece.weight * (1.0 if branch is None else branch.weight)
            return replace(piece, label=label + piece.label, weight=weight)
        case PromptPiece():
            return replace(piece, key=label + piece.key)


def _bare(piece: Piece, label: str) -> Piece:
    if isinstance(piece, PromptPiece):
        return replace(piece, key=piece.key.removeprefix(label))
    return replace(piece, label=piece.label.removeprefix(label))


class Member(Adapter):
    """One member's share of an adapter, as its clock sees it: its own method and its own pieces."""

    def __init__(self, whole: Adapter, number: int) -> None:
        label = f"{number}/"
        pieces = [_bare(p, label) for p in whole.pieces if p.key.startswith(label)]
        self._whole, self._number = whole, number
        super().__init__(whole.name, whole.method, whole.places, pieces)

    def _named(self, *, keep_vars: bool) -> dict[str, Tensor]:
        found = super()._named(keep_vars=keep_vars)
        return {n.replace(f"shared/{self._number}/", "shared/", 1): t for n, t in found.items()}

    @property
    def method(self) -> Method:
        """The member's method as it is in the adapter now: a run may fill in the number of steps later."""
        return cast("Composition", self._whole.method).methods[self._number]

    @method.setter
    def method(self, value: Method) -> None:
        pass  # only here because the dataclass sets its field


class Clocks(Clock):
    """Holds the members' clocks; each one is called around the steps by itself."""

    def __init__(self, adapter: Adapter, clocks: Sequence[Clock]) -> None:
        super().__init__(adapter)
        self.clocks = tuple(clocks)
