"""BitFit on norms whose channels are not the last dimension."""

from __future__ import annotations

import torch

import inlay
from inlay.testing.models import ZOO
from tests.golden.hand import agree, numbers, shake


def test_bitfit_on_convolutions_and_group_norms() -> None:
    model = ZOO["sequential"].build()
    x = ZOO["sequential"].batch(2, 0)["input"]
    adapter = shake(inlay.attach(model, inlay.BitFit()))
    leaves = numbers(adapter)
    bare = ZOO["sequential"].build()
    values = {
        n: p.detach() + leaves[f"delta/{n.removesuffix('.bias')}/offset"] if n.endswith("bias") else p.detach()
        for n, p in bare.named_parameters()
    }
    agree(adapter, model(x), torch.func.functional_call(bare, values, (x,)), leaves)
