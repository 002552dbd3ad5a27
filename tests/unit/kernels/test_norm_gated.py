"""Norms and gated feed-forwards that keep less: the same outputs and gradients, and only where they are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

import inlay
from inlay import LoRA
from inlay.kernels import gated, norm


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class ChainNorm(nn.Module):
    """As models write it; `offset` as Gemma's."""

    def __init__(self, features: int, offset: float = 0.0, power: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(features, seed=4))
        self.eps, self.offset, self.power = 1e-2, offset, power

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.abs().pow(self.power).mean(-1, keepdim=True) + self.eps)
        return (self.offset + self.weight) * wide.to(x.dtype)


class Feedforward(nn.Module):
    def __init__(self, *, halved: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj, self.act_fn, self.halved = nn.Linear(12, 8), nn.SiLU(), halved

    def forward(self, x: Tensor) -> Any:
        out = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out / 2 if self.halved else out


class Block(nn.Module):
    def __init__(self, some_norm: nn.Module, feedforward: nn.Module) -> None:
        super().__init__()
        self.first, self.input_norm, self.feedforward = nn.Linear(8, 8), some_norm, feedforward

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return hidden + self.feedforward(self.input_norm(hidden))  # type: ignore[no-any-return]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(7)
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), parameters)]


def both_ways(block: Block, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are the same bits, gradients the same numbers, with and without the fast paths."""
    block = block.to(dtype)
    x = drawn(3, 5, 8, seed=1, dtype=dtype)
    inlay.attach(block, LoRA(rank=2, dropout=0.25), where=lambda *_: True)
    block.train()
    with torch.no_grad():
        for parameter in inlay.adapters(block)["default"].parameters():
            parameter.normal_(std=0.3)
    ours = gradients(block, x)
    monkeypatch.setattr(norm, "applies", lambda *_: False)
    monkeypatch.setattr(gated, "applies", lambda *_: False)
    theirs = gradients(block, x)
    assert torch.equal(ours[0], theirs[0])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_same_with_and_without(dtype: torch.dtype, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = Block(ChainNorm(8, offset), Feedforward())
    both_ways(block, dtype, monkeypatch)
    assert norm._SEEN[block.input_norm] == (1e-2, offset)
    assert gated._SEEN[block.feedforward]


def test_modules_that_compute_something_else_keep_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = Block(ChainNorm(8, power=4), Feedforward(halved=True))
    both_ways(block, torch.float32, monkeypatch)
    assert norm._SEEN[block.input_norm] is None
    assert not gated._SEEN[block.feedforward]


def test_the_twin_of_the_gate() -> None:
    g, u = (drawn(4, 6, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    for function in (F.silu, F.gelu, torch.tanh, nn.Identity()):
        assert torch.autograd.gradcheck(lambda a, b, f=function: gated.Gate.apply(a, b, f), (g, u))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_formula_of_the_norm(offset: float) -> None:
    x, module = drawn(6, 8, seed=3).requires_grad_(), ChainNorm(8, offset)
    grad = drawn(6, 8, seed=5)
    (expected,) = torch.autograd.grad(module(x), x, grad)
    torch.testing.assert_close(norm.gradient(grad, x.detach(), module.weight, 1e-2, offset), expected)


def test_only_the_input_is_kept() -> None:
    block = Block(ChainNorm(8), Feedforward()).bfloat16()
    inlay.attach(block, LoRA(rank=1), where=lambda *_: True)
    x = drawn(64, 8, dtype=torch.bfloat16)
    block(x)  # the first call tries both ways
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    # x, the hidden states, what enters gate and up; gate, up and their product; four narrow activations.
    assert sum(kept.values()) <= 64 * 2 * (3 * 8 + 3 * 12 + 4)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_see_the_nonlinearity_as_the_model_calls_it(register: str) -> None:
    """Once a forward, with the graph that a penalty flows back through."""
    found = []
    for attached in (True, False):
        torch.manual_seed(0)
        block = Block(ChainNorm(8), Feedforward())
        if attached:
            inlay.attach(block, LoRA(rank=1), where=lambda *_: True)  # adds nothing yet
            block.requires_grad_(False)
        x, seen = drawn(3, 8).requires_grad_(), []
        block(x)  # the first call tries both ways
        assert not attached or gated._SEEN[block.feedforward]
        getattr(block.feedforward.act_fn, register)(lambda _, a, *b, seen=seen: seen.append((b or (a,))[-1]))
        loss = block(x).square().sum()
        if "forward" in register:
            loss = loss + (seen[-1] if isinstance(seen[-1], Tensor) else seen[-1][0]).square().sum()
        loss.backward()
        found.append((len(seen), x.grad))
    assert found[0][0] == found[1][0] == 1
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_norm_that_is_trained_keeps_its_own_way() -> None:
    block = Block(ChainNorm(8), Feedforward())
    inlay.attach(block, LoRA(rank=1), where=lambda *_: True)
    block.input_norm.weight.requires_grad_()
    block(drawn(2, 8)).sum().backward()
    assert block.input_norm.weight.grad is not None


def test_a_norm_that_is_parametrized_after_it_was_seen_keeps_its_own_way() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    block = Block(ChainNorm(8), Feedforward())
    inlay.attach(block, LoRA(rank=1), where=lambda *_: True)
    x = drawn(2, 8)
    block(x)
    weight = block.input_norm.weight.detach().clone()
    register_parametrization(block.input_norm, "weight", Doubled())
    found = block(x)
    remove_parametrizations(block.input_norm, "weight", leave_parametrized=False)
    with torch.no_grad():
        block.input_norm.weight.copy_(2 * weight)
    torch.testing.assert_close(found, block(x))
