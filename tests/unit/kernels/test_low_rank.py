"""The fused low-rank update against its twin; masks that are drawn again are the same masks, and fair."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay.kernels import low_rank, masks
from inlay.kernels.low_rank import add_low_rank, linear_with_low_rank
from inlay.methods._low_rank import LowRank


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def twin(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return y + scale * (x @ a.to(x.dtype).t() @ b.to(x.dtype).t())


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_sum_and_gradients(dtype: torch.dtype, tolerance: float, owned: bool) -> None:
    given = [
        drawn(2, 3, 12, dtype=dtype, seed=1),
        drawn(2, 3, 7, dtype=dtype, seed=2),
        drawn(4, 7, seed=3),
        drawn(12, 4, seed=4),
    ]
    found: list[Any] = []
    for sums in (twin, lambda *args: add_low_rank(*args, 0.0, owned=owned)):
        y, x, a, b = (t.clone().requires_grad_() for t in given)
        out = sums(y * 1, x, a, b, 0.5)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), (y, x, a, b))))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("trained", ["x a b", "a b", "x b"])
@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_layer_and_update_at_once(
    dtype: torch.dtype, tolerance: float, biased: bool, share: float, trained: str
) -> None:
    """What the layer's own function and the update beside it make, bit for bit, and their gradients."""
    given = {"x": drawn(2, 3, 7, dtype=dtype, seed=2), "a": drawn(4, 7, seed=3), "b": drawn(12, 4, seed=4)}
    layer = drawn(12, 7, dtype=dtype, seed=5), drawn(12, dtype=dtype, seed=6) if biased else None

    def apart(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return add_low_rank(F.linear(x, *layer), x, a, b, 0.5, share, owned=True)

    def at_once(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_with_low_rank(x, *layer, a, b, 0.5, share)

    found = []
    for way in (apart, at_once):
        own = {name: t.clone().requires_grad_(name in trained.split()) for name, t in given.items()}
        torch.manual_seed(0)  # the same mask
        out = way(**own)
        wanted = [t for t in own.values() if t.requires_grad]
        found.append((out, torch.autograd.grad(out.float().square().sum(), wanted)))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_backward_pass_in_autocast_is_the_forwards(share: float) -> None:
    """Who calls `backward` inside of the block gets what the forward outside of it is the function of."""
    model = nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 5))
    inlay.attach(model, inlay.LoRA(rank=2, dropout=share), where=lambda *_: True)
    parameters = list(inlay.adapters(model)["default"].parameters())
    for parameter in parameters:
        nn.init.normal_(parameter)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)  # the same mask
        x = drawn(3, 7).requires_grad_()
        loss = model(x).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(loss, [x, *parameters]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_only_a_plain_frozen_layer_is_computed_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one with code of its own, nor with trained parameters, nor for a delta that computes something else."""
    taken: list[int] = []
    at_once = linear_with_low_rank

    def counted(*args: Any) -> Tensor:
        taken.append(1)
        return at_once(*args)

    monkeypatch.setattr("inlay.methods._low_rank.linear_with_low_rank", counted)

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Doubled(LowRank):
        def post(self, x: Tensor, y: Tensor, site: Any) -> Tensor:
            return 2 * super().post(x, y, site)

        def post_into(self, x: Tensor, y: Tensor, site: Any) -> Tensor:
            return self.post(x, y, site)

    def count(layer: nn.Module, *, train: bool = False, kind: type[LowRank] | None = None) -> int:
        model = nn.Sequential(layer)
        inlay.attach(model, inlay.LoRA(rank=2), where=lambda *_: True)
        (delta,) = (m for m in model.modules() if isinstance(m, LowRank))
        delta.__class__ = kind or LowRank
        nn.init.normal_(delta.b)
        layer.weight.requires_grad_(train)
        taken.clear()
        x = drawn(3, 4)
        with torch.no_grad():
            apart = model(x)
        torch.testing.assert_close(model(x), apart)
        return len(taken)

    assert count(nn.Linear(4, 4)) == 1
    assert count(Scaled(4, 4)) == count(nn.Linear(4, 4), train=True) == count(nn.Linear(4, 4), kind=Doubled) == 0
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: 3 * nn.Linear.forward(patched, x)  # type: ignore[method-assign]
    assert count(patched) == 0


def test_a_tensor_of_somebody_else_is_not_written() -> None:
    y, x, a, b = drawn(5, 12), drawn(5, 7), drawn(4, 7), drawn(12, 4)
    before = y.clone()
    with torch.no_grad():
        add_low_rank(y, x, a, b, 1.0, 0.0, owned=False)
        assert torch.equal(y, before)
        add_low_rank(y.view(5, 12), x, a, b, 1.0, 0.0, owned=True)  # a view's base may be in use
        assert torch.equal(y, before)
        assert add_low_rank(y, x, a, b, 1.0, 0.0, owned=True) is y


def test_the_mask_of_the_backward_pass_is_the_one_of_the_forward() -> None:
    """With identity matrices the output shows the mask, and so does the gradient."""
    x = torch.ones(64, 32, requires_grad=True)
    a, b = torch.eye(32), torch.eye(32)
    out = add_low_rank(torch.zeros(64, 32), x, a, b, 1.0, 0.25, owned=True)
    out.sum().backward()
    assert out.detach().unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(x.grad != 0, out != 0)


def kept(count: int, seed: int, share: float) -> Tensor:
    return low_rank._dropped(torch.ones(count), seed, share) != 0


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.9])
def test_masks_are_fair_and_repeatable(share: float) -> None:
    count = 200_003
    first = kept(count, 11, share)
    assert abs(float(first.float().mean()) - (1 - share)) < 5 * (share * (1 - share) / count) ** 0.5 + 2**-16
    by_place = first[: count // 4 * 4].view(-1, 4).float().mean(0)  # four entries come from one word
    assert float((by_place - (1 - share)).abs().max()) < 0.01
    assert torch.equal(first, kept(count, 11, share))
    assert not torch.equal(first, kept(count, 12, share))


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_entries_are_dropped_independently(share: float) -> None:
    """Neighbours, and the ends: the first and the last entry are as likely to go as any."""
    dropped = ~kept(1_000_000, 3, share)
    for apart in (1, 2, 7):
        both = float((dropped[apart:] & dropped[:-apart]).float().mean())
        assert both == pytest.approx(share**2, abs=5e-3 * share + 5e-4)
    ends = torch.stack([(~kept(5, seed, share))[[0, 4]] for seed in range(4000)]).float().mean(0)
    assert ends.tolist() == pytest.approx([share, share], abs=0.03)


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_the_same_in_every_dtype(share: float, dtype: torch.dtype) -> None:
    x = drawn(100, 7, dtype=dtype) + 10
    assert torch.equal(low_rank._dropped(x, 4, share), x * kept(700, 4, share).view(100, 7))


def test_one_seed_gives_one_training_run() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    inlay.attach(model, inlay.LoRA(rank=2, dropout=0.5), where=lambda *_: True)
    with torch.no_grad():
        for parameter in inlay.adapters(model)["default"].parameters():
            parameter.normal_()
    x = drawn(16, 8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(copy.deepcopy(model).train()(x))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_little_is_kept_for_the_backward_pass() -> None:
    """The layer's input and rank numbers a row; no mask, no dropped copy, no update."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).requires_grad_(False)
    inlay.attach(model, inlay.LoRA(rank=2, dropout=0.1), where=lambda *_: True)
    x = drawn(128, 64).requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(x)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert sum(kept.values()) <= x.numel() * 4 + 128 * 2 * 4 + weights


@pytest.mark.parametrize("share", [0.001, 0.05, 0.15])
def test_gaps_have_the_geometric_distribution(share: float) -> None:
    """Mean, spread and every cumulated probability, as near as 16 bits allow."""
    gaps = masks._gaps(share).double()
    assert float(gaps.mean()) == pytest.approx(1 / share, rel=1e-4)
    assert float(gaps.var()) == pytest.approx((1 - share) / share**2, rel=1e-3)
    at = torch.arange(1, int(gaps.max()) + 1, dtype=torch.float64)
    cumulated = (gaps[None, :] <= at[::97, None]).double().mean(1)
    assert float((cumulated - (1 - (1 - share) ** at[::97])).abs().max()) <= 2**-16
