"""Checkpointing of an attached model touches only layers that gradients flow through."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay.testing.models import ZOO


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [inlay.LoRA(rank=2), inlay.Pfeiffer()])
def test_layers_below_the_adapter_run_once(method: Any, reentrant: bool) -> None:
    torch.manual_seed(0)
    specimen = ZOO["llama"]
    model = specimen.build()
    inlay.attach(model, method, layers=[1])
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    ran: list[tuple[int, bool]] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, x, n=number: ran.append((n, x[0].requires_grad)))
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _, x, y: embedded.append(y))
    batch = {name: value for name, value in specimen.batch(2, 5).items() if name != "labels"}
    model(**batch).logits.sum().backward()
    assert [n for n, _ in ran] == [0, 1, 1] and not ran[0][1]
    assert not embedded[0].requires_grad
    assert all(p.grad is not None for p in inlay.adapters(model)["default"].parameters())


def test_the_models_own_switch_is_back_after_detaching() -> None:
    model = ZOO["llama"].build()
    inlay.attach(model, inlay.LoRA(rank=2))
    inlay.detach(model, "default")
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long)).requires_grad
