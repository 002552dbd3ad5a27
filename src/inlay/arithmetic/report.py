"""What combining adapters cost, site by site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SiteError:
    """How far the new adapter is from the exact weighted sum at one site.

    Attributes:
        frobenius: ‖new − exact‖ / ‖exact‖ in the Frobenius norm; 0 where both are zero, infinite where only the
            exact sum is.
        spectral: the same in the spectral norm, where it costs nothing; else None.
        rank: of the new adapter's factors here; None where it has none.
    """

    frobenius: float
    spectral: float | None = None
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class CombineReport:
    """What `combine` made.

    Attributes:
        name: of the new adapter.
        method: its method's registry key.
        how: the way it was made.
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
    """Size of a difference beside the size of what is exact."""
    above = float(torch.linalg.vector_norm(difference)) if isinstance(difference, Tensor) else difference
    below = float(torch.linalg.vector_norm(exact)) if isinstance(exact, Tensor) else exact
    if above == 0:
        return 0.0
    return above / below if below else float("inf")
