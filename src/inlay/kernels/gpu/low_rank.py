"""The narrow products of a low-rank update with dropout, without a mask or a dropped copy of x in memory.

    narrowed      drop(x) Aᵀ            (n, rank)     reads x once
    gradient_of_a dlowᵀ drop(x)         (rank, in)    reads x once, sums parts of the rows in a fixed order
    gradient_of_x drop(dlow A)          (n, in)       writes the product already dropped

`philox.keeps` decides which entries are kept. They are not scaled: the update's factor includes 1 / (1 − share). Sums
are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.gpu import interpreted
from inlay.kernels.gpu.philox import keeps, threshold

ROWS, COLUMNS = 64, 64  # size of a tile
PARTS = 16  # into so many parts are rows split, each summed by itself


@triton.jit
def _dot(a, b, total, WIDE: tl.constexpr):
    """WIDE is for the interpreter, which cannot multiply bfloat16 matrices; the products are the same."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _dropped(x, row, column, rows, columns, seed, start, below, WIDTH: tl.constexpr):
    """A tile of x with zeros where entries are dropped, or outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    kept = keeps(seed, row, columns, start, below, WIDTH)
    return tl.load(x + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside & kept, other=0.0)


@triton.jit(do_not_specialize=["seed", "below"])
def _narrowed(
    x, a, out, rows, columns, rank, seed, below,
    R: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, r = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, R)
    total = tl.zeros((HEIGHT, R), tl.float32)
    for start in range(0, columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        tile = _dropped(x, row, column, rows, columns, seed, start, below, WIDTH)
        there = (column < columns)[:, None] & (r < rank)[None, :]
        narrow = tl.load(a + r[None, :] * columns + column[:, None], mask=there, other=0.0)
        total = _dot(tile, narrow, total, WIDE)
    at = row.to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["seed", "below"])
def _gradient_of_a(
    low, x, out, rows, columns, rank, seed, below,
    R: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    start, part, parts = tl.program_id(0) * WIDTH, tl.program_id(1), tl.num_programs(1)
    column, r = start + tl.arange(0, WIDTH), tl.arange(0, R)
    total = tl.zeros((R, WIDTH), tl.float32)
    for first in range(part * HEIGHT, rows, parts * HEIGHT):
        row = first + tl.arange(0, HEIGHT)
        tile = _dropped(x, row, column, rows, columns, seed, start, below, WIDTH)
        there = (row < rows)[None, :] & (r < rank)[:, None]
        narrow = tl.load(low + row.to(tl.int64)[None, :] * rank + r[:, None], mask=there, other=0.0)
        total = _dot(narrow, tile, total, WIDE)
    at = (part * rank + r[:, None]) * columns + column[None, :]
    tl.store(out + at, total, mask=(r < rank)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["seed", "below"])
def _gradient_of_x(
    low, a, out, rows, columns, rank, seed, below,
    R: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, start, r = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT), tl.program_id(1) * WIDTH, tl.arange(0, R)
    column = start + tl.arange(0, WIDTH)
    here, there = (row < rows)[:, None] & (r < rank)[None, :], (r < rank)[:, None] & (column < columns)[None, :]
    narrow = tl.load(low + row.to(tl.int64)[:, None] * rank + r[None, :], mask=here, other=0.0)
    wide = tl.load(a + r[:, None] * columns + column[None, :], mask=there, other=0.0)
    total = _dot(narrow, wide, tl.zeros((HEIGHT, WIDTH), tl.float32), WIDE)
    total = tl.where(keeps(seed, row, columns, start, below, WIDTH), total, 0.0)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


def narrowed(x: Tensor, a: Tensor, seed: int, share: float) -> Tensor:
    """drop(x) Aᵀ, (n, rank), of x (…, in) and a (rank, in) of its dtype."""
    x = x.reshape(-1, x.shape[-1]).contiguous()
    rows, columns = x.shape
    out = x.new_empty(rows, a.shape[0])
    with torch.cuda.device_of(x):
        _narrowed[(triton.cdiv(rows, ROWS),)](x, a.contiguous(), out, rows, columns, *_given(a.shape[0], seed, share))
    return out


def gradient_of_a(low: Tensor, x: Tensor, seed: int, share: float) -> Tensor:
    """dlowᵀ drop(x), (rank, in) in float32, of low (n, rank) and x (…, in) of its dtype."""
    x, low = x.reshape(-1, x.shape[-1]).contiguous(), low.contiguous()
    (rows, columns), rank = x.shape, low.shape[1]
    parts = min(PARTS, triton.cdiv(rows, ROWS))
    out = x.new_empty(parts, rank, columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gradient_of_a[(triton.cdiv(columns, COLUMNS), parts)](low, x, out, rows, columns, *_given(rank, seed, share))
    return out.sum(0)


def gradient_of_x(low: Tensor, a: Tensor, seed: int, share: float) -> Tensor:
    """drop(dlow A), (n, in), of low (n, rank) and a (rank, in) of its dtype."""
    rows, (rank, columns) = low.shape[0], a.shape
    out = low.new_empty(rows, columns)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    with torch.cuda.device_of(low):
        _gradient_of_x[grid](low.contiguous(), a.contiguous(), out, rows, columns, *_given(rank, seed, share))
    return out


def _given(rank: int, seed: int, share: float) -> tuple[int | bool, ...]:
    """Arguments common to the three kernels; matrix units need at least 16 rows."""
    return rank, seed, threshold(share), max(16, triton.next_power_of_2(rank)), ROWS, COLUMNS, interpreted()
