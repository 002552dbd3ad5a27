"""Importing large libraries: their notices off, and without looking for garbage among what they make."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from inlay.train.quiet import hush


@contextmanager
def importing() -> Iterator[None]:
    """No garbage collection inside; what is there after an import is never looked through again.

    torch, transformers and datasets make millions of objects that live as long as the process. Collections while they
    appear, and the one that starts every training loop, take a fifth of a command's start-up. Where all of it was
    imported before, nothing is kept: garbage may lie about, the model of an earlier run among it.
    """
    hush()
    was_on, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if was_on:
            gc.enable()
