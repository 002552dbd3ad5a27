"""Bases: layer types whose weights inlay can read and write, and how models are read.

dense.py          torch's own layers; registered when this package is imported
bitsandbytes.py   NF4, FP4 and int8 layers; registered once anything imports bitsandbytes
torchao.py        int8 and int4 weights; the same for torchao
loading.py        a base from its files, quantised layer by layer while they are read
context.py        how many tokens a base can read
trial.py          which method works on which kind of base

inlay imports neither library before a base needs it.
"""

from __future__ import annotations

import sys
from importlib import import_module

from inlay.bases import dense
from inlay.core.model.layer import LATE

__all__ = ["dense", "register"]

_ROOMS = ("bitsandbytes", "torchao")


def register() -> None:
    """Register the layers of the libraries that have been imported."""
    for library in _ROOMS:
        room = f"{__name__}.{library}"
        if library in sys.modules and room not in sys.modules:
            import_module(room)


LATE.append(register)
