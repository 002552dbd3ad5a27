"""Noise of libraries that says nothing a user can act on, off while a run lasts."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and notices of transformers and datasets; errors still show.

    What these notices are about (weights that are missing or of other shapes, special tokens) is checked
    in `loading.py`, which raises instead.
    """
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is installed
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
    import datasets
    from transformers.utils import logging

    # Says that an optional package for 4-bit layers on a CPU is absent, to everyone who imports it.
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)
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
