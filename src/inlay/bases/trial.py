"""Which method works on which kind of base, found by attaching it to a tiny model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from inlay.bases.loading import LIBRARIES, read_quantised
from inlay.core.build import build, initialise
from inlay.core.contracts.method import Method
from inlay.core.errors import UserError
from inlay.core.model.select import Places


def refusal(method: Method, name: str, *, files: bool = False) -> str | None:
    """Why a method cannot be attached to a base of this quantisation (`LIBRARIES`); None if it can.

    A method that is initialised from data is built but not initialised.

    Args:
        files: whether the folder that the base was quantised from is still there.
    """
    if find_spec(LIBRARIES[name]) is None:
        return f"{LIBRARIES[name]} is not installed, so it was not tried"
    model: Any = copy.deepcopy(_base(name))
    with TemporaryDirectory() as folder:
        if files:
            with _quietly():
                _dense().save_pretrained(folder)
            model.name_or_path = folder
        try:
            adapter = build(model, method, name="tried", places=Places.of(None, None))
            if not method.needs_data:
                initialise(model, adapter)
        except UserError as error:
            return str(error)
    return None


@cache
def _dense() -> Any:
    """A tiny Llama with every kind of parameter a Llama can have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_bias=True, **sizes))


@cache
def _base(name: str) -> nn.Module:
    """The same model, quantised."""
    from transformers import AutoModelForCausalLM

    dense = _dense()
    with _quietly():
        made: nn.Module = read_quantised(AutoModelForCausalLM, dense.config, dense.state_dict(), name, dense.dtype)[0]
    return made


@contextmanager
def _quietly() -> Iterator[None]:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
