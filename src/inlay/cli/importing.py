"""Importing large libraries without looking for garbage among what they make."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """No garbage collection inside; what is there at the end is never looked through again.

    torch, transformers and datasets make millions of objects that live as long as the process. Collections while they
    appear, and the one that starts every training loop, take a fifth of a command's start-up.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
