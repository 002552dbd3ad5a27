"""Which entries dropout keeps, computed from a seed: the same in every kernel, whatever its tiles.

Philox 4×32 with seven rounds gives four words for a counter, 16 bits for each of eight neighbouring entries:
entry (i, j) of a matrix of n columns is half j mod 2 of word (j mod 8) / 2 at counter i · ⌈n / 8⌉ + ⌊j / 8⌋.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS: tl.constexpr = tl.constexpr(7)  # the fewest that pass the usual test suites (Salmon et al., SC 2011)


def threshold(share: float) -> int:
    """Entries whose 16 bits are below this are dropped."""
    return round(share * 2**16)


@triton.jit
def keeps(seed, row, columns, start, below, WIDTH: tl.constexpr):
    """The mask (rows, WIDTH) of the entries from column `start` on; `start` and WIDTH are multiples of eight."""
    eighth = start // 8 + tl.arange(0, WIDTH // 8)
    counter = row[:, None] * ((columns + 7) // 8) + eighth[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter, n_rounds=ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.uint32, bitcast=True)  # (rows, WIDTH / 8, 2, 2)
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (row.shape[0], WIDTH)) >= below


def kept(rows: int, columns: int, seed: int, share: float, device: torch.device) -> Tensor:
    """The naive twin: (rows, columns)."""
    groups = -(-columns // 8)
    found = words(torch.arange(rows * groups, device=device), seed)
    halves = torch.stack([half for word in found for half in (word & 0xFFFF, word >> 16)], -1)
    return halves.reshape(rows, groups * 8)[:, :columns] >= threshold(share)


def words(counter: Tensor, seed: int) -> list[Tensor]:
    """The four words of each counter, computed with torch's signed integers."""
    state = [counter & 0xFFFFFFFF, *(torch.zeros_like(counter) for _ in range(3))]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(ROUNDS.value):
        a, b = _product(state[0], 0xD2511F53), _product(state[2], 0xCD9E8D57)
        state = [b[0] ^ state[1] ^ key[0], b[1], a[0] ^ state[3] ^ key[1], a[1]]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return state


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 × 32 bit product, which would not fit a signed 64-bit number."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & 0xFFFFFFFF
