"""The base's own dropout: the distribution of torch's, one mask forward and backward, and nothing kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.kernels.dropout import Dropout


class Block(nn.Module):
    """A place for an adapter and a dropout behind it."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.first, self.dropout = nn.Linear(8, 8), dropout

    def forward(self, x: Tensor) -> Any:
        return self.dropout(self.first(x))


def attached(dropout: nn.Module) -> Block:
    torch.manual_seed(0)
    model = Block(dropout)
    inlay.attach(model, inlay.LoRA(rank=2), where=lambda *_: True)
    return model.train()


def ways(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the module gives by its own seed, and what torch's dropout gives by the same."""
    outs = []
    for way in (model, lambda t: torch.dropout(model.first(t), model.dropout.p, True)):  # type: ignore[union-attr, arg-type]
        torch.manual_seed(3)
        outs.append(way(x))
    return outs


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_dropped_by_their_share_and_the_others_scaled(share: float, dtype: torch.dtype) -> None:
    x = torch.rand(300, 70, 10, dtype=torch.float32).add_(0.5).to(dtype)
    y = Dropout.apply(x, share, 5)
    kept = y != 0
    count = x.numel()
    assert abs(float(kept.double().mean()) - (1 - share)) < 5 * (share * (1 - share) / count) ** 0.5
    torch.testing.assert_close(y[kept], (x / (1 - share))[kept], rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=0)
    # Neighbours, and what is a row apart, are dropped independently of one another.
    for step in (1, 10, 700):
        flat = kept.flatten().double()
        both = float((flat[step:] * flat[:-step]).mean())
        assert abs(both - (1 - share) ** 2) < 5 * (share / count) ** 0.5


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_gradient_has_the_mask_of_the_output(share: float) -> None:
    x = torch.rand(64, 32).add_(0.5).requires_grad_()
    y = Dropout.apply(x, share, 11)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad * x, y)


def test_transposed_inputs_keep_their_meaning() -> None:
    x = torch.rand(6, 5, 4).add_(0.5).transpose(0, 2)
    y = Dropout.apply(x, 0.5, 1)
    kept = y != 0
    assert y.shape == x.shape and 0 < int(kept.sum()) < x.numel()
    torch.testing.assert_close(y[kept], 2 * x[kept])


def test_it_acts_on_an_attached_model_and_ends_with_it() -> None:
    model, x = attached(nn.Dropout(0.25)), torch.rand(32, 8)
    ours, torchs = ways(model, x)
    assert not torch.equal(ours, torchs)
    kept = ours != 0
    torch.testing.assert_close(ours[kept], (model.first(x) / 0.75)[kept])
    inlay.detach(model, "default")
    assert torch.equal(*ways(model, x))


def test_seeds_decide() -> None:
    model, x = attached(nn.Dropout(0.25)), torch.rand(32, 8)
    first, again, other = (torch.manual_seed(seed) and model(x) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "dropout", [nn.Dropout(0.0), nn.Dropout(1.0), nn.Dropout1d(0.25), type("Own", (nn.Dropout,), {})(0.25)]
)
def test_other_dropout_is_torchs(dropout: nn.Module) -> None:
    model, x = attached(dropout), torch.rand(32, 8)
    outs = []
    for way in (model, lambda t: dropout(model.first(t))):
        torch.manual_seed(3)
        outs.append(way(x))
    assert torch.equal(*outs)
    model.eval()
    assert torch.equal(model(x), model.first(x))


def test_no_mask_is_kept() -> None:
    model, x = attached(nn.Dropout(0.25)), torch.rand(512, 8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert sum(t.numel() for t in kept) <= x.numel() + 512 * 2 + 3 * 64


@pytest.mark.parametrize("share", [0.99, 0.9999999])
def test_a_share_that_16_bits_cannot_say_is_torchs_own(share: float) -> None:
    model = attached(nn.Dropout(share))
    assert torch.equal(*ways(model, torch.ones(300, 8)))
