"""Silencing messages of libraries that a user cannot act on, during a run."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Iterator
from contextlib import contextmanager

# The first two log while transformers is imported, the last whenever an optional package for 4-bit layers is missing.
TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")


def hush() -> None:
    """Let these loggers report errors only; best called before the libraries are imported."""
    for name in TALKATIVE:
        python_logging.getLogger(name).setLevel(python_logging.ERROR)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and notices of transformers and datasets; errors still show.

    `loading.py` checks what these notices are about (weights that are missing or have other shapes, special tokens) and
    raises instead.
    """
    hush()
    import datasets
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    dataset_bars = datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if not dataset_bars:
            datasets.enable_progress_bars()
