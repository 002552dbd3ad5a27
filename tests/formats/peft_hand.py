"""What the tests of PEFT's files share: both libraries on the same base, with the same random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import inlay
from inlay.testing.models import ZOO
from tests.golden.hand import inputs, shake

MODELS = ("llama", "bert", "t5")  # a decoder, an encoder and an encoder–decoder


@torch.no_grad()
def logits(name: str, model: Any) -> Tensor:
    """Of real tokens only; behind a prompt that the other library leaves in its output.

    Computed in float64: the two libraries sum in another order, and T5, whose attention is not scaled, makes up to
    1e-4 of a float32's rounding, more or less by processor. Two readings of one file differ by far more.
    """
    batch = inputs(name, ragged=True)
    found: Tensor = model.eval().double()(**batch).logits
    model.float()  # every value as it was
    mask = batch["attention_mask"].bool()
    if found.dim() == 3 and "decoder_input_ids" not in batch:
        found = found[:, found.shape[1] - mask.shape[1] :][mask]
    return found


def ours(name: str, method: Any, *, size: float = 0.2, **where: Any) -> tuple[Any, Any]:
    """A model of the zoo with a random adapter of ours."""
    torch.manual_seed(0)
    model = ZOO[name].build()
    return model, shake(inlay.attach(model, method, **where), size)


def theirs(name: str, config: Any, folder: Path, *, size: float = 0.2) -> Tensor:
    """Save a random adapter of PEFT's in `folder`; returns its logits."""
    import peft

    torch.manual_seed(1)
    model: Any = peft.get_peft_model(ZOO[name].build(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * size)
    model.save_pretrained(folder)
    return logits(name, peft.PeftModel.from_pretrained(ZOO[name].build(), folder))


def in_peft(name: str, folder: Path) -> Tensor:
    import peft

    return logits(name, peft.PeftModel.from_pretrained(ZOO[name].build(), folder))


def in_inlay(name: str, folder: Path, **options: Any) -> Tensor:
    model = ZOO[name].build()
    inlay.load(model, folder, **options)
    return logits(name, model)


def same(actual: Tensor, expected: Tensor, base: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within the tolerance, while the adapter changes the base by far more."""
    assert actual.shape == expected.shape
    effect = float((expected - base).abs().max())
    assert effect > 0.05, "the adapter hardly does anything, so this would prove nothing"
    error = float((actual - expected).abs().max())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), error
