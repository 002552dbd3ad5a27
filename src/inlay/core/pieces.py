"""What a method hands to `attach`: trained modules, each with the place it goes to.

Nothing in the model changes while pieces are built, so a method that fails leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass

from inlay.core.delta import Delta
from inlay.core.prompt import KeyValuePrompt, TokenPrompt
from inlay.core.site import Site
from inlay.core.subset import Difference


@dataclass(frozen=True)
class DeltaPiece:
    """A delta and its site."""

    site: Site
    delta: Delta

    @property
    def key(self) -> str:
        return self.site.key


@dataclass(frozen=True)
class PromptPiece:
    """A prompt; `key` names its tensors in the file."""

    key: str
    prompt: TokenPrompt | KeyValuePrompt


@dataclass(frozen=True)
class SubsetPiece:
    """A difference to one parameter of the base."""

    path: str
    parameter: str
    difference: Difference

    @property
    def key(self) -> str:
        return f"{self.path}.{self.parameter}" if self.path else self.parameter


Piece = DeltaPiece | PromptPiece | SubsetPiece
