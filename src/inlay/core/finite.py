"""Adapters whose values are no numbers, as of a training that diverged."""

from __future__ import annotations

from collections.abc import Sequence

from inlay.core.adapter import Adapter
from inlay.core.errors import UnsupportedError, problems


def not_finite(adapter: Adapter) -> list[str]:
    """Names of the tensors with values that are no numbers, of what a file would hold: in training, a gate that is
    open or closed for good may be infinite."""
    _, tensors = adapter.method.stored(adapter)
    return [n for n, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]


def check_finite(adapters: Sequence[Adapter]) -> None:
    """Raise one `UnsupportedError` that names every tensor with values that are no numbers.

    What is computed from them says nothing, and the largest of several errors may not show it.
    """
    wrong = [f"{adapter.name!r}: {name}" for adapter in adapters for name in not_finite(adapter)]
    if wrong:
        said = [*wrong[:8], *([f"and {len(wrong) - 8} more"] if len(wrong) > 8 else [])]
        raise UnsupportedError(
            problems("values that are not finite, as of a training that diverged; train again", said)
        )
