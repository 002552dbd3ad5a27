"""Compiles every kernel for a GPU of architecture 8.0, which needs none; `test_gpu.py` runs this file."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inlay.kernels.gpu import gated, labelled_loss, low_rank, norm

HALF, WIDE = "*bf16", "*fp32"
TILES = {"R": 16, "HEIGHT": 64, "WIDTH": 64, "WIDE": False}
NUMBERS = dict.fromkeys(("rows", "columns", "rank", "below"), "i32") | {"seed": "i64"}


def compiled(kernel: Any, constants: dict[str, Any], **types: str) -> None:
    """Raises what Triton raises."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert made.asm["cubin"]


compiled(low_rank._narrowed, TILES, x=HALF, a=HALF, out=HALF, **NUMBERS)
compiled(low_rank._gradient_of_a, TILES, low=HALF, x=HALF, out=WIDE, **NUMBERS)
compiled(low_rank._gradient_of_x, TILES, low=HALF, a=HALF, out=HALF, **NUMBERS)
scalars = {"vocabulary": "i32", "factor": "fp32", "cap": "fp32"}
options = {"CAPPED": True, "WRITES": True, "BLOCK": 4096}
compiled(labelled_loss._cross_entropy, options, scores=HALF, labels="*i64", losses=WIDE, **scalars)
elementwise = dict.fromkeys(("grad", "gate", "up", "d_gate", "d_up"), HALF)
for kind in gated.KNOWN:
    compiled(gated._backward, {"KIND": kind, "BLOCK": 1024}, count="i32", **elementwise)
vectors = dict.fromkeys(("grad", "x", "weight", "out"), HALF)
compiled(norm._gradient, {"BLOCK": 2048}, features="i32", epsilon="fp32", offset="fp32", **vectors)
