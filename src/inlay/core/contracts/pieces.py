"""What a method hands to `attach`: trained modules, each with the place it goes to.

Nothing in the model changes while pieces are built, so a method that fails leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass

from inlay.core.contracts.delta import Delta
from inlay.core.contracts.prompt import KeyValuePrompt, TokenPrompt
from inlay.core.contracts.subset import Difference
from inlay.core.model.site import Site


@dataclass(frozen=True)
class Branch:
    """A piece's place in a composition (`core/forward/chain.py`): the branch of a fork, and its weight."""

    fork: str
    number: int
    weight: float = 1.0


@dataclass(frozen=True)
class DeltaPiece:
    """A delta and its site.

    Attributes:
        label: stands in front of the key, to tell the members of a composition apart.
        branches: its place in a composition, outermost fork first.
    """

    site: Site
    delta: Delta
    label: str = ""
    branches: tuple[Branch, ...] = ()

    @property
    def key(self) -> str:
        return self.label + self.site.key


@dataclass(frozen=True)
class PromptPiece:
    """A prompt; `key` names its tensors in the file."""

    key: str
    prompt: TokenPrompt | KeyValuePrompt


@dataclass(frozen=True)
class SubsetPiece:
    """A difference to one parameter of the base; `weight` is its share in a composition."""

    path: str
    parameter: str
    difference: Difference
    label: str = ""
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The full name of the parameter."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @property
    def key(self) -> str:
        return self.label + self.name


Piece = DeltaPiece | PromptPiece | SubsetPiece
