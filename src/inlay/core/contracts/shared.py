"""What several pieces of one adapter have in common: stored once, counted once, the same object everywhere.

A frozen random projection used by every layer (VeRA), the slow weights of Compacter, the values of new tokens
in an embedding and in the head tied to it, the counters of a schedule. A piece holds it as an ordinary child;
`Adapter.tensors` finds it there and stores it under ``shared/<key>/<name>``.
"""

from __future__ import annotations

from torch import nn

from inlay.core.model.view import ModelView


class Shared(nn.Module):
    """A child that several pieces of one adapter hold.

    Args:
        key: names its tensors in the file; unique within the adapter.
    """

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def initialise(self, view: ModelView) -> None:
        """Fill new parameters and buffers; called once, before any piece is initialised."""


def shared_in(module: nn.Module) -> dict[str, Shared]:
    """Name within `module` → shared child, each child once."""
    return {name: child for name, child in module.named_modules() if isinstance(child, Shared)}
