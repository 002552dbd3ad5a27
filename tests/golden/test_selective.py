"""Full fine-tuning and top layers: one step of SGD equals plain fine-tuning of a copy of the base."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.testing.models import ZOO
from tests.golden.hand import close, cotangent, inputs, zoo_model

RATE = 0.05


def step(model: Any, parameters: Any, batch: dict[str, Tensor], name: str) -> None:
    """Two steps of SGD with momentum and weight decay off."""
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        out = ZOO[name].logits(model(**batch))
        (out * cotangent(out)).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral", "bert", "t5", "bart", "vit", "sequential"])
def test_full_fine_tuning_is_fine_tuning(name: str) -> None:
    batch = inputs(name)
    plain: Any = zoo_model(name)
    step(plain, plain.parameters(), batch, name)
    model: Any = zoo_model(name)
    adapter = inlay.attach(model, inlay.FullFineTuning())
    assert adapter.count == sum(p.numel() for p in plain.parameters())
    step(model, adapter.parameters(), batch, name)
    with torch.no_grad():
        close(ZOO[name].logits(model(**batch)), ZOO[name].logits(plain(**batch)))
    stored = adapter.tensors()
    base = dict(zoo_model(name).named_parameters())
    for parameter, value in plain.named_parameters():
        close(base[parameter] + stored[f"difference/{parameter}/difference"], value)
    inlay.merge(model, "default")
    with torch.no_grad():
        close(ZOO[name].logits(model(**batch)), ZOO[name].logits(plain(**batch)))
        for parameter, value in plain.named_parameters():
            close(model.get_parameter(parameter), value)


@pytest.mark.parametrize(
    "name, top, pattern",
    [
        ("llama", 1, r"model\.layers\.1\..*"),
        ("gpt2", 2, r"transformer\.h\.[01]\..*"),
        ("bert", 1, r"bert\.encoder\.layer\.1\..*"),
        ("t5", 1, r"decoder\.block\.1\..*"),
        ("bart", 1, r"model\.decoder\.layers\.1\..*"),
        ("vit", 1, r"vit\.layers\.1\..*"),
    ],
)
def test_top_layers_are_fine_tuning_of_the_uppermost_layers(name: str, top: int, pattern: str) -> None:
    batch = inputs(name)
    plain: Any = zoo_model(name)
    chosen = {n: p for n, p in plain.named_parameters() if re.fullmatch(pattern, n)}
    for parameter, value in plain.named_parameters():
        value.requires_grad_(parameter in chosen)
    step(plain, chosen.values(), batch, name)
    model: Any = zoo_model(name)
    adapter = inlay.attach(model, inlay.TopLayers(top=top))
    assert set(adapter.tensors()) == {f"difference/{n}/difference" for n in chosen}
    step(model, adapter.parameters(), batch, name)
    with torch.no_grad():
        close(ZOO[name].logits(model(**batch)), ZOO[name].logits(plain(**batch)))


def test_a_saved_head_is_trained_like_a_plain_one() -> None:
    """LoRA with `modules_to_save`: the classifier's copy takes the same steps as a plain classifier."""
    batch = inputs("bert")
    plain: Any = ZOO["bert"].build()
    plain.requires_grad_(False)
    plain.classifier.requires_grad_(True)
    step(plain, plain.classifier.parameters(), batch, "bert")
    model: Any = ZOO["bert"].build()
    adapter = inlay.attach(model, inlay.LoRA(rank=1), modules_to_save=["classifier"])
    copies = list(adapter.copies.values())
    step(model, copies, batch, "bert")
    with torch.no_grad():
        close(model(**batch).logits, plain(**batch).logits)
    close(adapter.tensors()["copy/classifier.weight"], plain.classifier.weight)
    bare: Any = ZOO["bert"].build()
    assert torch.equal(model.classifier._parameters["weight"], bare.classifier.weight)
