"""Kernels for GPUs, written in Triton, in the places where `inlay.kernels` has formulas for the CPU.

low_rank.py       dropout(x) Aᵀ and its backward, the mask drawn again from a seed
labelled_loss.py  cross-entropy of a chunk of logits, overwritten by its gradient
gated.py          backward of f(g) ∘ u
norm.py           backward of an RMS norm
philox.py         the mask
twins.py          the naive twin of each, and how far they are apart

As on the CPU, only what is stored and differentiated changes; the base's forward keeps its bits. All kernels were
compared with their twins in Triton's interpreter on a CPU, and compiled for the architectures 8.0 and 9.0. Their speed
was never measured (`benchmarks/gpu.py` would do so). Their modules import Triton, so they are only imported if `serves`
is true.
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

from torch import Tensor


def serves(tensor: Tensor) -> bool:
    """Whether kernels can run on a tensor: on a CUDA device with Triton, or anywhere in Triton's interpreter."""
    return (tensor.is_cuda or (interpreted() and tensor.device.type == "cpu")) and _installed()


def interpreted() -> bool:
    """Whether Triton interprets its kernels, for which the environment variable must be set before importing it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None
