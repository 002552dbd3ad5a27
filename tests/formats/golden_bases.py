"""The bases under the golden files: the zoo's models, with values that no library and no processor can change.

`torch.randn` may differ in its last bit from one processor or version to the next, and then a base would no longer
have the fingerprint that a file names. Here every value is a random integer of numpy's, scaled exactly.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inlay.testing.models import ZOO
from tests import tiny
from tests.golden.hand import inputs


def base(name: str) -> Any:
    """A fresh model of the zoo, in eval mode."""
    return filled(name, ZOO[name].build())


def folder_of(name: str, folder: Path) -> Path:
    """A base with a tokenizer, ``llama`` or ``bert``, as `inlay train` and `inlay evaluate` load it."""
    from transformers import AutoModel, AutoModelForCausalLM

    getattr(tiny, name)(folder)
    kind = AutoModelForCausalLM if name == "llama" else AutoModel
    filled(f"tiny {name}", kind.from_pretrained(folder)).save_pretrained(folder)
    return folder


@torch.no_grad()
def filled(name: str, model: Any) -> Any:
    """The model with uniform values in every parameter: matrices of unit gain, norms near one."""
    for path, parameter in model.named_parameters():
        middle = 1.0 if parameter.dim() < 2 and path.endswith("weight") else 0.0
        parameter.copy_(torch.from_numpy(uniform(f"{name} {path}", tuple(parameter.shape), middle)))
    return model


def uniform(key: str, shape: tuple[int, ...], middle: float = 0.0) -> np.ndarray:
    """Values by name and shape alone, in float32; their spread shrinks with what a row sums up."""
    drawn = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).integers(-(2**20), 2**20, shape)
    width = 0.2 if len(shape) < 2 else 1.5 / int(np.prod(shape[1:])) ** 0.5
    return (middle + drawn * (width / 2**20)).astype(np.float32)


@torch.no_grad()
def sampled(name: str, model: Any, count: int = 16) -> list[float]:
    """A few of the model's logits on a ragged batch, evenly spread over the real tokens."""
    batch = inputs(name, ragged=ZOO[name].padding_sides != ())
    output = model.eval()(*batch.values()) if name == "sequential" else model.eval()(**batch)
    logits: Tensor = ZOO[name].logits(output).float()
    mask = batch.get("attention_mask")
    if mask is not None and logits.dim() == 3 and "decoder_input_ids" not in batch:
        logits = logits[:, -mask.shape[1] :][mask.bool()]
    flat = logits.flatten()
    places = torch.linspace(0, flat.numel() - 1, min(count, flat.numel())).long()
    return [float(f"{value:.8g}") for value in flat[places].tolist()]
