"""The backward pass of an RMS norm, one program per row: x and the gradient are read once.

dx = r · (g − x · r² · mean(g ∘ x)),   g = (w + offset) ∘ dy,   r = (mean(x²) + ε)^(−1/2)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gradient(grad, x, weight, out, features, epsilon, offset, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside, row = at < features, tl.program_id(0).to(tl.int64) * features
    wide = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row + at, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    r = 1 / tl.sqrt(tl.sum(wide * wide, 0) / features + epsilon)
    found = r * (g - wide * (r * r * tl.sum(g * wide, 0) / features))
    tl.store(out + row + at, found.to(out.dtype.element_ty), mask=inside)


def gradient(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    """The gradient with respect to x: (…, features), in its dtype."""
    grad, x = grad.contiguous(), x.contiguous()
    out, features = torch.empty_like(x), x.shape[-1]
    with torch.cuda.device_of(x):
        _gradient[(x.numel() // features,)](
            grad, x, weight, out, features, float(epsilon), float(offset), triton.next_power_of_2(features),
            num_warps=8 if features > 2048 else 4,
        )  # fmt: skip
    return out
