"""OFT and BOFT against the bare base with W Rᵀ in place of W, R written out from the papers; and against PEFT."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import BOFT, OFT
from inlay.testing.models import ZOO
from tests.golden.dense import check, sites
from tests.golden.hand import agree, close, numbers, shake
from tests.golden.places import PLACES, places
from tests.golden.test_peft import TARGETS, attached, compare, filled

QV = ("query", "value")


def skew(upper: Tensor, size: int) -> Tensor:
    """Q from the rows of its upper triangle."""
    rows = []
    for i in range(size):
        row = []
        for j in range(size):
            low, high = min(i, j), max(i, j)
            at = low * size - low * (low + 1) // 2 + high - low - 1
            row.append(upper.new_zeros(()) if i == j else upper[at] if i < j else -upper[at])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def exact(upper: Tensor, size: int) -> Tensor:
    one, q = torch.eye(size, dtype=upper.dtype), skew(upper, size)
    return (one - q) @ torch.linalg.inv(one + q)


def series(upper: Tensor, size: int, terms: int) -> Tensor:
    one, q = torch.eye(size, dtype=upper.dtype), skew(upper, size)
    return (one - q) @ torch.stack([torch.linalg.matrix_power(-q, i) for i in range(terms - 1)]).sum(0)


def butterfly(uppers: Tensor, size: int) -> Tensor:
    """B_m … B₁: in factor i, block by block, two runs of half a block that lie 2^(i − 1) runs apart."""
    factors, blocks, _ = uppers.shape
    width, half = blocks * size, size // 2
    whole = torch.eye(width, dtype=uppers.dtype)
    for factor in range(factors):
        apart = 2**factor
        dense = uppers.new_zeros(width, width)
        block = 0
        for start in range(0, width, size * apart):
            for offset in range(apart):
                runs = [start + (offset + side * apart) * half for side in range(2)]
                at = torch.cat([torch.arange(run, run + half) for run in runs])
                dense = dense.index_put((at[:, None], at[None, :]), exact(uppers[factor, block], size))
                block += 1
        whole = dense @ whole
    return whole


# -- OFT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACES)
def test_oft_turns_the_inputs_block_by_block(name: str) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert own["skew"].shape == (4, 28)
        return w @ torch.block_diag(*[exact(u, 8) for u in own["skew"]]).t(), b

    check(name, OFT(block_size=8), set(places(name, *QV)), change)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_oft_by_the_number_of_blocks_and_with_one_for_all(name: str) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert own["skew"].shape == (1, 120)
        return w @ torch.block_diag(*[exact(own["skew"][0], 16)] * 2).t(), b

    check(name, OFT(blocks=2, share_blocks=True), set(places(name, *QV)), change)


@pytest.mark.parametrize("terms", [3, 4, 5, 8])
def test_the_truncated_series_of_oft(terms: int) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w @ torch.block_diag(*[series(u, 4, terms) for u in own["skew"]]).t(), b

    check("llama", OFT(block_size=4, neumann_terms=terms), set(places("llama", *QV)), change)


def turned(method: Any, size: float, width: int = 48) -> tuple[nn.Sequential, Tensor]:
    """A layer without bias under a shaken adapter, and its R."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 20, bias=False))
    shake(inlay.attach(model, method, where=["0"]), size)
    delta: Any = inlay.adapters(model)["default"].pieces[0].delta  # type: ignore[union-attr]
    with torch.no_grad():
        return model, delta.turn(torch.eye(width))


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("method", [OFT(block_size=16), OFT(blocks=1), BOFT(block_size=8, factors=2), BOFT(factors=1)])
def test_rotations_are_orthogonal_of_determinant_one(method: Any, size: float) -> None:
    model, rotation = turned(method, size)
    close(rotation @ rotation.t(), torch.eye(48), tolerance=1e-6 if size < 1 else 1e-5)
    close(torch.linalg.det(rotation.double()), torch.tensor(1.0).double(), tolerance=1e-5)
    assert (rotation - torch.eye(48)).abs().max() > size / 10
    base: Any = model[0]
    gram = base.weight @ base.weight.t()
    inlay.merge(model, "default")
    close(base.weight @ base.weight.t(), gram)  # lengths of neurons and angles between them


def test_the_truncated_series_is_only_nearly_orthogonal() -> None:
    def error(terms: int) -> float:
        _, rotation = turned(OFT(block_size=8, neumann_terms=terms), 0.05)
        return float((rotation @ rotation.t() - torch.eye(48)).abs().max())

    assert error(3) > 10 * error(5) > 10 * error(9)
    assert error(5) > 1e-5


# -- BOFT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACES)
def test_boft_turns_the_inputs_by_a_butterfly(name: str) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert own["skew"].shape == (3, 8, 6)
        return w @ butterfly(own["skew"], 4).t(), b

    check(name, BOFT(block_size=4, factors=3), set(places(name, *QV)), change)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_the_scale_of_boft_leaves_biases_alone(name: str) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return own["scale"][:, None] * (w @ butterfly(own["skew"], 8).t()), b

    check(name, BOFT(block_size=8, factors=2, scaled=True), set(places(name, *QV)), change)


def test_one_factor_is_oft_and_may_be_odd() -> None:
    def answer(method: Any) -> Tensor:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(15, 4)), torch.randn(3, 15)
        shake(inlay.attach(model, method, where=["0"]))
        return model(x)

    close(answer(BOFT(block_size=5, factors=1)), answer(OFT(block_size=5)))


@pytest.mark.parametrize("factors", [3, 4])
def test_a_full_butterfly_is_dense_and_a_shorter_one_is_not(factors: int) -> None:
    """The paper's point: blocks of 2 and log₂ d factors carry every input to every output."""
    _, rotation = turned(BOFT(block_size=2, factors=factors), 0.5, width=16)
    assert (rotation != 0).sum() == 16 * 2**factors


def test_the_wiring_is_that_of_the_official_code() -> None:
    """PEFT's permutations are the authors'; its CPU path computes one factor only, so the product is written out."""
    from peft.tuners.boft.layer import BOFTLayer

    generator = torch.Generator().manual_seed(3)
    width, size, factors = 48, 4, 3
    model = nn.Sequential(nn.Linear(width, 4, bias=False))
    adapter = inlay.attach(model, BOFT(block_size=size, factors=factors), where=["0"])
    full = 0.5 * torch.randn(factors, width // size, size, size, generator=generator)  # boft_R
    upper = torch.triu_indices(size, size, 1)
    half = 0.5 * (full - full.transpose(-1, -2))
    with torch.no_grad():
        adapter.tensors()["delta/0/skew"].copy_(half[..., upper[0], upper[1]])
    whole = torch.eye(width)
    for factor in range(factors):
        order = BOFTLayer.block_butterfly_perm(None, width, width // size // 2**factor, size // 2, factors - 1)
        permutation = torch.eye(width)[order]
        cayley = [(torch.eye(size) - q) @ torch.linalg.inv(torch.eye(size) + q) for q in half[factor]]
        whole = permutation @ torch.block_diag(*cayley) @ permutation.t() @ whole
    x = torch.randn(5, width, generator=generator)
    base: Any = model[0]
    close(model(x), x @ whole @ base.weight.t())


# -- both -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [OFT(block_size=8), BOFT(block_size=4, factors=3, scaled=True)])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_start_is_the_identity_in_half_precision_too(name: str, method: Any) -> None:
    base: Any = ZOO[name].build(dtype=torch.bfloat16)
    batch = ZOO[name].batch(2, 0)
    with torch.no_grad():
        before = base(**batch).logits
        adapter = inlay.attach(base, method)
        assert torch.equal(base(**batch).logits, before)
    own = numbers(adapter)
    assert all(torch.equal(v, torch.full_like(v, float(n.endswith("scale")))) for n, v in own.items())


@pytest.mark.parametrize(
    "method, words",
    [
        (OFT(block_size=5), ["12 inputs, not divisible by 5", "block_size", "divisors: 1, 2, 3, 4, 6, 12", "1 has 9"]),
        (OFT(blocks=8), ["12 inputs, not divisible by 8", "blocks", "divisors: 1, 2, 3, 4, 6, 12"]),
        (BOFT(block_size=4, factors=2), ["12 inputs, not divisible by 8", "factors", "divisors: 1, 2, 3, 4, 6, 12"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(method: Any, words: list[str]) -> None:
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 3))
    with pytest.raises(inlay.UserError) as caught:
        inlay.attach(model, method, where=["0", "1"])
    assert all(word in str(caught.value) for word in words), caught.value
    assert not inlay.adapters(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OFT(block_size=4, blocks=4),
        lambda: OFT(block_size=1),
        lambda: OFT(neumann_terms=2),
        lambda: BOFT(block_size=3, factors=2),
        lambda: BOFT(factors=0),
    ],
)
def test_senseless_settings_are_refused(make: Any) -> None:
    with pytest.raises(inlay.UserError):
        make()


@pytest.mark.parametrize("method", [OFT(block_size=8), BOFT(block_size=4, factors=2)])
def test_rotations_that_were_kept_are_never_old_ones(method: Any) -> None:
    """Without gradients they are kept from one forward to the next; every way to change the skews is noticed."""
    model, x = nn.Sequential(nn.Linear(16, 4, bias=False)), torch.randn(3, 16)
    adapter = shake(inlay.attach(model, method, where=["0"]))
    (skews,) = adapter.parameters()

    def stale() -> bool:
        with torch.no_grad():
            kept = model(x)
        return not torch.equal(kept, model(x).detach())  # with gradients nothing is kept

    assert not stale()
    model(x).square().sum().backward()
    torch.optim.AdamW([skews], lr=0.1).step()
    assert not stale()
    with torch.no_grad():
        skews.mul_(2.0)
    assert not stale()
    skews.data = torch.randn(skews.shape)
    assert not stale()
    with torch.inference_mode():
        model(x)
    assert not stale()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        next(inlay.adapters(twin)["default"].parameters()).zero_()
        assert not torch.equal(twin(x), before)
        assert torch.equal(model(x), before)


def test_a_whole_fused_layer_is_turned_in_front() -> None:
    """GPT-2's kernel is stored as (in, out); named as a whole, its parts share one rotation."""
    model: Any = nn.Sequential(ZOO["gpt2"].build().transformer.h[0].attn.c_attn)
    adapter = shake(inlay.attach(model, OFT(block_size=16), where=["0"]))
    leaves = numbers(adapter)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    rotation = torch.block_diag(*[exact(u, 16) for u in sites(leaves)["0"]["skew"]])
    kernel, bias = model[0].weight.detach(), model[0].bias.detach()
    agree(adapter, model(x), x @ rotation @ kernel + bias, leaves)


# -- PEFT -------------------------------------------------------------------------------------------


def renamed(values: dict[str, Tensor], sign: float = 1.0) -> dict[str, Tensor]:
    return {f"{n.split('/')[1]}.oft_R.default.weight": sign * v for n, v in values.items()}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_peft_with_the_same_skews_gives_the_same_logits(name: str, share: bool) -> None:
    import peft

    targets, task = TARGETS[name]
    ours, values = attached(name, OFT(block_size=8, share_blocks=share))
    config = peft.OFTConfig(
        oft_block_size=8, block_share=share, use_cayley_neumann=False, target_modules=targets, task_type=task
    )
    compare(name, ours, filled(name, config, renamed(values)))


def test_peft_series_turns_the_other_way_than_its_exact_form() -> None:
    import peft

    targets, task = TARGETS["llama"]
    for terms in (4, 5, 7):
        ours, values = attached("llama", OFT(block_size=8, neumann_terms=terms))
        config = peft.OFTConfig(
            oft_block_size=8, num_cayley_neumann_terms=terms, target_modules=targets, task_type=task
        )
        compare("llama", ours, filled("llama", config, renamed(values, sign=-1.0)))


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_peft_with_the_same_butterfly_gives_the_same_logits(name: str) -> None:
    import peft

    targets, task = TARGETS[name]
    ours, values = attached(name, BOFT(block_size=4, factors=1, scaled=True))
    config = peft.BOFTConfig(boft_block_size=4, target_modules=targets, task_type=task)
    upper = torch.triu_indices(4, 4, 1)
    shaped = {}
    for stored, value in values.items():
        _, site, number = stored.split("/")
        if number == "scale":
            shaped[f"{site}.boft_s.default"] = value[:, None]
        else:
            whole = value.new_zeros(*value.shape[:-1], 4, 4)
            whole[..., upper[0], upper[1]] = value
            shaped[f"{site}.boft_R.default"] = whole - whole.transpose(-1, -2)
    compare(name, ours, filled(name, config, shaped))


# -- counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [1, 2, 4])
def test_boft_trains_half_of_m_d_times_b_minus_one(factors: int) -> None:
    model = nn.Sequential(nn.Linear(64, 10))
    adapter = inlay.attach(model, BOFT(block_size=8, factors=factors), where=["0"])
    assert adapter.count == factors * 64 * (8 - 1) // 2 == factors * math.comb(8, 2) * 8
