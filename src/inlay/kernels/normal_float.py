"""Normal-float codes: weights in 4 or 2 bits, with quantiles of the normal distribution as levels.

Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3 and appendix E; the 2-bit levels follow the same rule in
Li et al. 2023 (LoftQ), arXiv:2310.08659, as in its authors' code. A weight, row by row, is cut into blocks of 64:

    constants[i] = max |block i|        codes = number of the level nearest to weight / constants[i]

Codes are packed into bytes, the first in the highest bits, as bitsandbytes stores NF4; the last block may be shorter.
The levels of k bits: 2^(k-1) quantiles below zero, zero, and 2^(k-1) - 1 above, divided by the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.forward.transforms import transformed

BLOCK = 64
LEVELS = {
    2: (-1.0, 0.0, 0.33791524171829224, 1.0),
    4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip
TINY = 1e-38  # replaces the constant of a block of zeros


def sizes(numbers: int, bits: int) -> tuple[int, int]:
    """Bytes of codes, and number of constants, for so many numbers."""
    blocks = -(-numbers // BLOCK)
    return blocks * BLOCK * bits // 8, blocks


def quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (bytes) and constants (blocks, float32) of a weight of any shape."""
    flat = weight.reshape(-1).float()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    constants = blocks.abs().amax(1)  # (blocks)
    levels = torch.tensor(LEVELS[bits], device=weight.device)
    scaled = (blocks * (1.0 / constants.clamp(min=TINY))[:, None]).clamp(-1, 1)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)  # (blocks, 64)
    packed = codes.reshape(-1, 8 // bits) << _shifts(bits, weight.device)  # (bytes, codes a byte)
    return packed.sum(1, dtype=torch.uint8), constants


def dequantise(codes: Tensor, constants: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The weight given by codes and constants, in float32."""
    levels = torch.tensor(LEVELS[bits], device=codes.device)
    every = torch.arange(256, device=codes.device, dtype=torch.int32)
    table = levels[(every[:, None] >> _shifts(bits, codes.device).int()) & (2**bits - 1)]  # (256, codes a byte)
    blocks = table.index_select(0, codes.int()).reshape(-1, BLOCK) * constants.float()[:, None]
    numbers = 1
    for size in shape:
        numbers *= size
    return blocks.reshape(-1)[:numbers].reshape(shape)


def made_again_linear(x: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """x · make()ᵀ for a frozen matrix that is made again for the backward pass and never stored.

    Args:
        x: (..., in).
        make: returns the matrix (out, in) in x's dtype, the same each time.
    """
    if transformed() or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
        return F.linear(x, make())
    made: Tensor = _MadeAgain.apply(x, make)  # type: ignore[no-untyped-call]
    return made


class _MadeAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        ctx.make = make
        return F.linear(x, make())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.make(), None


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(8 - bits, -1, -bits, device=device, dtype=torch.uint8)
