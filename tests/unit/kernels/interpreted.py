"""Kernels for GPUs in Triton's interpreter; `test_gpu.py` runs this file in a process where that is on."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import inlay
from inlay.kernels import gated, low_rank, norm
from inlay.kernels import gpu as kernels
from inlay.kernels.gpu import labelled_loss as gpu_labelled_head
from inlay.kernels.gpu import low_rank as gpu_low_rank
from inlay.kernels.gpu import philox, twins
from inlay.testing.models import ZOO

SMALL = twins.Sizes(rows=5, features=12, rank=3, vocabulary=37)
RAGGED = twins.Sizes(rows=67, features=100, rank=20, vocabulary=130, share=0.5)


@pytest.mark.parametrize("dtype", list(twins.TOLERANCE), ids=str)
@pytest.mark.parametrize("sizes", [SMALL, RAGGED], ids=["small", "ragged"])
def test_kernels_and_their_twins(sizes: twins.Sizes, dtype: torch.dtype) -> None:
    found = twins.differences(sizes, "cpu", dtype)
    assert {name: apart for name, apart in found.items() if not apart <= twins.TOLERANCE[dtype]} == {}


def test_random_words_are_philox() -> None:
    """Published values for seven rounds, counter and key zero."""
    found = [int(word[0]) for word in philox.words(torch.zeros(1, dtype=torch.long), 0)]
    assert found == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_masks_are_fair(share: float) -> None:
    kept = philox.kept(500, 203, 7, share, torch.device("cpu"))
    sigma = (share * (1 - share) / kept.numel()) ** 0.5
    assert float(kept.float().mean()) == pytest.approx(1 - share, abs=5 * sigma)
    assert float((~kept[:, 1:] & ~kept[:, :-1]).float().mean()) == pytest.approx(share**2, abs=5 * sigma)
    assert not torch.equal(kept, philox.kept(500, 203, 8, share, torch.device("cpu")))


def test_a_wrong_kernel_is_noticed() -> None:
    with mock.patch.object(gpu_low_rank, "threshold", lambda share: philox.threshold(share) + 2**14):
        assert twins.differences(SMALL, "cpu", torch.float32)["low_rank"] > 0.1


def test_the_mask_of_the_backward_pass_is_the_one_of_the_forward() -> None:
    x = torch.ones(64, 32, requires_grad=True)
    out = low_rank.add_low_rank(torch.zeros(64, 32), x, torch.eye(32), torch.eye(32), 1.0, 0.25, owned=True)
    out.sum().backward()
    assert out.detach().unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert x.grad is not None and torch.equal(x.grad != 0, out != 0)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_sums_and_gradients_are_those_of_the_mask(dropout: float) -> None:
    given = [torch.randn(*s, generator=torch.Generator().manual_seed(len(s))) for s in ((2, 3, 12), (2, 3, 7))]
    given += [torch.randn(4, 7), torch.randn(12, 4)]
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    mask = philox.kept(6, 7, seed, dropout, torch.device("cpu")).reshape(2, 3, 7) / (1 - dropout)
    found: list[Any] = []
    for ours in (True, False):
        y, x, a, b = (t.clone().requires_grad_() for t in given)
        torch.manual_seed(5)
        if ours:
            out = low_rank.add_low_rank(y * 1, x, a, b, 0.5, dropout, owned=True)
        else:
            out = y + 0.5 * (x * mask @ a.t() @ b.t())
        found.append((out, *torch.autograd.grad(out.square().sum(), (y, x, a, b))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_model_takes_them_and_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a whole model, with the kernels and without."""
    specimen = ZOO["llama"]
    model: Any = specimen.build()
    adapter = inlay.attach(model, inlay.LoRA(rank=2, dropout=0.0), where="all-linear")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
    batch = specimen.batch(2, 1)

    def step() -> list[Tensor]:
        loss = model(**batch).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(adapter.parameters()))]

    with mock.patch.object(gpu_labelled_head, "cross_entropy_", wraps=gpu_labelled_head.cross_entropy_) as called:
        ours = step()
    assert called.called
    assert any(norm._SEEN.values()) and any(gated._SEEN.values())
    monkeypatch.setattr(kernels, "serves", lambda _: False)
    for one, other in zip(ours, step(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
