"""LoHa and LoKr against the bare base with the papers' dense products, and against Hugging Face PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import LoHa, LoKr
from tests.golden.dense import check, sites
from tests.golden.hand import agree, close, numbers, shake
from tests.golden.places import PLACES, places
from tests.golden.test_peft import TARGETS, attached, compare, filled

QV = ("query", "value")


def kronecker(one: Tensor, two: Tensor) -> Tensor:
    """Every element of `one` times the whole of `two`, written out."""
    return torch.cat([torch.cat([value * two for value in row], dim=1) for row in one])


def matrix(own: dict[str, Tensor], name: str) -> Tensor:
    return own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"]


# -- LoHa -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACES)
def test_loha_is_an_elementwise_product_of_two_low_rank_matrices(name: str) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        one = torch.einsum("or,ri->oi", own["w1_a"], own["w1_b"])
        two = torch.einsum("or,ri->oi", own["w2_a"], own["w2_b"])
        return w + 5.0 / 3 * one * two, b  # alpha / rank, once

    check(name, LoHa(rank=3, alpha=5.0), set(places(name, *QV)), change)


def test_the_rank_of_loha_reaches_the_square_of_its_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20))
    base = model[0].weight.detach().clone()
    shake(inlay.attach(model, LoHa(rank=3), where=["0"]), 1.0)
    inlay.merge(model, "default")
    assert torch.linalg.matrix_rank(model[0].weight - base, rtol=1e-5) == 9


def test_loha_starts_like_lycoris() -> None:
    torch.manual_seed(0)
    own = sites(numbers(inlay.attach(nn.Sequential(nn.Linear(400, 300)), LoHa(rank=16), where=["0"])))["0"]
    for name, deviation in (("w1_a", 0.1), ("w1_b", 1.0), ("w2_b", 1.0)):
        close(own[name].std() / deviation, torch.tensor(1.0), tolerance=0.05)
    assert not own["w2_a"].any()


def test_loha_keeps_no_dense_matrix_for_the_backward_pass() -> None:
    model, x = nn.Sequential(nn.Linear(64, 48)), torch.randn(3, 64)
    inlay.attach(model, LoHa(rank=2), where=["0"])
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert kept and 64 * 48 not in kept
    y.sum().backward()


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_peft_with_the_same_hadamard_factors_gives_the_same_logits(name: str) -> None:
    import peft

    targets, task = TARGETS[name]
    ours, values = attached(name, LoHa(rank=3, alpha=5.0))
    config = peft.LoHaConfig(r=3, alpha=5, target_modules=targets, task_type=task)
    compare(name, ours, filled(name, config, _renamed(values, "hada")))


# -- LoKr -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACES)
def test_lokr_is_a_kronecker_product(name: str) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert own["w1"].shape == (4, 4)
        assert own["w2_b"].shape == (2, w.shape[1] // 4)
        return w + 5.0 / 2 * kronecker(own["w1"], matrix(own, "w2")), b

    check(name, LoKr(rank=2, alpha=5.0, factor=4), set(places(name, *QV)), change)


@pytest.mark.parametrize(
    "sizes, method, stored, scale",
    [
        ((96, 64), LoKr(rank=3, alpha=6.0), {"w1": (8, 8), "w2_a": (12, 3), "w2_b": (3, 8)}, 2.0),
        ((96, 64), LoKr(rank=3, alpha=6.0, factor=2), {"w1": (2, 2), "w2_a": (48, 3), "w2_b": (3, 32)}, 2.0),
        # 5 divides neither: the largest divisors below it.
        ((96, 64), LoKr(rank=3, alpha=6.0, factor=5), {"w1": (4, 4), "w2_a": (24, 3), "w2_b": (3, 16)}, 2.0),
        ((7, 64), LoKr(rank=3, alpha=6.0), {"w1": (1, 8), "w2_a": (7, 3), "w2_b": (3, 8)}, 2.0),
        (
            (96, 64),
            LoKr(rank=3, alpha=6.0, decompose_both=True),
            {"w1_a": (8, 3), "w1_b": (3, 8), "w2_a": (12, 3), "w2_b": (3, 8)},
            2.0,
        ),
        # Rank 4 is half of 8: w1 whole, w2 with 12 still not.
        (
            (96, 64),
            LoKr(rank=4, alpha=6.0, decompose_both=True),
            {"w1": (8, 8), "w2_a": (12, 4), "w2_b": (4, 8)},
            1.5,
        ),
        ((96, 64), LoKr(rank=6, alpha=12.0), {"w1": (8, 8), "w2": (12, 8)}, 1.0),
        ((96, 64), LoKr(rank=6, alpha=12.0, scale_whole=True), {"w1": (8, 8), "w2": (12, 8)}, 2.0),
        # w2 whole, w1 not: a rank is left, and its scale.
        (
            (32, 12),
            LoKr(rank=3, alpha=6.0, factor=8, decompose_both=True),
            {"w1_a": (8, 3), "w1_b": (3, 3), "w2": (4, 4)},
            2.0,
        ),
    ],
)
def test_shapes_scale_and_value_of_lokr(
    sizes: tuple[int, int], method: LoKr, stored: dict[str, tuple[int, int]], scale: float
) -> None:
    torch.manual_seed(0)
    out, inner = sizes
    model = nn.Sequential(nn.Linear(inner, out))
    base: Any = model[0]
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    adapter = shake(inlay.attach(model, method, where=["0"]))
    leaves = numbers(adapter)
    own = sites(leaves)["0"]
    assert {n: tuple(t.shape) for n, t in own.items()} == stored
    x = torch.randn(2, 5, inner)
    changed = weight + scale * kronecker(matrix(own, "w1"), matrix(own, "w2"))
    agree(adapter, model(x), x @ changed.t() + bias, leaves)
    inlay.merge(model, "default")
    close(model[0].weight, changed)


@pytest.mark.parametrize("rank, both", [(2, True), (2, False), (16, False)])
def test_lokr_starts_like_lycoris(rank: int, both: bool) -> None:
    torch.manual_seed(0)
    method = LoKr(rank=rank, decompose_both=both)
    own = sites(numbers(inlay.attach(nn.Sequential(nn.Linear(400, 400)), method, where=["0"])))["0"]
    for name, value in own.items():
        if name in ("w2", "w2_b"):
            assert not value.any()
        else:
            bound = value.shape[1] ** -0.5  # Kaiming-uniform with a = √5
            assert 0.9 * bound < value.abs().max() <= bound


@pytest.mark.parametrize("rank, both", [(1, True), (2, False), (16, False)])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_peft_with_the_same_kronecker_factors_gives_the_same_logits(name: str, rank: int, both: bool) -> None:
    """Also where both are whole, which the peer scales by alpha / rank."""
    import peft

    targets, task = TARGETS[name]
    ours, values = attached(name, LoKr(rank=rank, alpha=5.0, decompose_both=both, scale_whole=True))
    config = peft.LoKrConfig(r=rank, alpha=5, decompose_both=both, target_modules=targets, task_type=task)
    compare(name, ours, filled(name, config, _renamed(values, "lokr")))


def _renamed(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {}
    for stored, value in values.items():
        _, site, number = stored.split("/")
        found[f"{site}.{prefix}_{number}.default"] = value
    return found


# -- both -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [LoHa, LoKr])
def test_ranks_and_alphas_of_single_sites(cls: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    adapter = inlay.attach(model, cls(rank=2, rank_pattern={"1": 3}, alpha_pattern={"1": 6.0}), where=["0", "1"])
    name = "w2_a"
    assert [sites(numbers(adapter))[site][name].shape[1] for site in ("0", "1")] == [2, 3]
    assert [p.delta.scale for p in adapter.pieces] == [4.0, 2.0]  # type: ignore[union-attr]
    with pytest.raises(inlay.UserError, match="'2' fits none"):
        inlay.attach(model, cls(rank_pattern={"2": 3}), name="other", where=["0", "1"])
    with pytest.raises(inlay.UserError, match="at least 1"):
        cls(rank_pattern={"1": 0})
