"""The error of combining adapters, site by site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SiteError:
    """How far the new adapter is from the exact weighted sum at one site.

    Attributes:
        frobenius: ‖new − exact‖ / ‖exact‖ in the Frobenius norm; 0 if both are zero, infinite if only the exact sum is.
        spectral: the same in the spectral norm, if it is known at no cost; else None.
        rank: rank of the new adapter's factors here; None if it has none.
    """

    frobenius: float
    spectral: float | None = None
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class CombineReport:
    """The result of `combine`.

    Attributes:
        name: name of the new adapter.
        method: its method's registry key.
        how: how the adapters were combined.
        sites: site or parameter → error.
    """

    name: str
    method: str
    how: str
    sites: dict[str, SiteError]

    @property
    def worst(self) -> float:
        """The largest relative Frobenius error of any site."""
        return max((site.frobenius for site in self.sites.values()), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        sites = {k: {"frobenius": e.frobenius, "spectral": e.spectral, "rank": e.rank} for k, e in self.sites.items()}
        return {"name": self.name, "method": self.method, "how": self.how, "worst": self.worst, "sites": sites}


def relative(difference: Tensor | float, exact: Tensor | float) -> float:
    """The norm of a difference divided by the norm of the exact value."""
    above = float(torch.linalg.vector_norm(difference)) if isinstance(difference, Tensor) else difference
    below = float(torch.linalg.vector_norm(exact)) if isinstance(exact, Tensor) else exact
    if above == 0:
        return 0.0
    return above / below if below else float("inf")
