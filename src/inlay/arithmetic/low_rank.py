"""Sums of factored changes: concatenated, which is exact, or compressed to a rank without forming the dense matrix.

    Σ w_i L_i R_i = (w_1 L_1 | w_2 L_2 | …) (R_1 ; R_2 ; …)            rank Σ r_i
    L = Q_L U,  Rᵀ = Q_R V,  U Vᵀ = X Σ Yᵀ  (Σ r × Σ r)                the best rank k: Q_L X_k √Σ_k, √Σ_k Y_kᵀ Q_Rᵀ

Two thin QR decompositions and the SVD of a small matrix: O((out + in) r²) instead of O(out · in · min(out, in)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inlay.arithmetic.report import SiteError, relative

DENSE_LIMIT = 1024  # up to this size of the smaller side, a dense SVD is fast enough, and exact
OVERSAMPLE, ROUNDS = 32, 8  # for the randomised SVD above it; its error is measured like any other


class Factors(NamedTuple):
    """A change as ``left @ right``: (out, rank) and (rank, in)."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])

    def dense(self) -> Tensor:
        return self.left @ self.right


def concatenate(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact weighted sum."""
    return Factors(
        torch.cat([w * p.left for w, p in zip(weights, parts, strict=True)], 1), torch.cat([p.right for p in parts])
    )


def compress(exact: Factors, rank: int) -> tuple[Factors, SiteError]:
    """The best factors of at most `rank`, and their error."""
    left, upper = torch.linalg.qr(exact.left.double())
    right, lower = torch.linalg.qr(exact.right.double().mT)
    x, sizes, y = torch.linalg.svd(upper @ lower.mT)
    kept = min(rank, len(sizes))
    root = sizes[:kept].sqrt()
    found = Factors((left @ x[:, :kept]) * root, root[:, None] * (y[:kept] @ right.mT))
    dropped = float(sizes[kept]) if kept < len(sizes) else 0.0
    error = SiteError(frobenius=relative(sizes[kept:], sizes), spectral=relative(dropped, float(sizes[0])), rank=kept)
    return found, error


def factorise(dense: Tensor, rank: int) -> Factors:
    """Factors of at most `rank` that approximate a dense change; the best ones up to `DENSE_LIMIT`."""
    if min(dense.shape) <= max(DENSE_LIMIT, 2 * (rank + OVERSAMPLE)):
        x, sizes, y = torch.linalg.svd(dense, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[dense.device] if dense.is_cuda else []):
            torch.manual_seed(0)
            x, sizes, v = torch.svd_lowrank(dense, q=rank + OVERSAMPLE, niter=ROUNDS)
        y = v.mT
    kept = min(rank, len(sizes))
    root = sizes[:kept].sqrt()
    return Factors(x[:, :kept] * root, root[:, None] * y[:kept])
