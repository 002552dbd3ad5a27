"""Combined adapters beside dense sums that are written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import inlay
from inlay.arithmetic import combine
from inlay.arithmetic.sparse import threshold

Weights = st.floats(-2, 2, allow_nan=False).filter(lambda w: abs(w) > 1e-2)
Ranks = st.integers(1, 5)


class Two(nn.Module):
    """Two layers that are not square."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def shaken(model: nn.Module, method: Any, name: str, seed: int, **options: Any) -> inlay.Adapter:
    adapter = inlay.attach(model, method, name=name, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return adapter


def model_with(ranks: list[int], alphas: list[float], where: list[list[str]] | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = Two()
    for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        places = ["up", "down"] if where is None else where[i]
        shaken(model, inlay.LoRA(rank=rank, alpha=alpha), f"a{i}", seed=i, where=places)
    return model


def changes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Merged minus base, in double precision; nothing of the adapter's own code is asked for factors."""
    base = {n: model.get_submodule(n).weight.detach().double() for n in ("up", "down")}  # type: ignore[operator]
    found = {}
    for piece in inlay.adapters(model)[name].pieces:
        assert hasattr(piece, "delta")
        found[piece.key] = piece.delta.weight(base[piece.key], None)[0].detach() - base[piece.key]
    return {n: found.get(n, torch.zeros_like(w)) for n, w in base.items()}


def summed(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    each = {name: changes(model, name) for name in weights}
    return {n: torch.stack([w * each[a][n] for a, w in weights.items()]).sum(0) for n in ("up", "down")}


def near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    for name, value in expected.items():
        assert float((actual[name] - value).abs().max()) <= tolerance * max(1.0, float(value.abs().max())), name


@settings(max_examples=20)
@given(st.lists(st.tuples(Ranks, st.floats(0.5, 20), Weights), min_size=1, max_size=4))
def test_concatenation_is_the_weighted_sum(parts: list[tuple[int, float, float]]) -> None:
    model = model_with([r for r, _, _ in parts], [a for _, a, _ in parts])
    weights = {f"a{i}": w for i, (_, _, w) in enumerate(parts)}
    expected = summed(model, weights)
    report = combine(model, weights, name="sum")
    near(changes(model, "sum"), expected)
    assert report.worst == 0 and {e.rank for e in report.sites.values()} == {sum(r for r, _, _ in parts)}
    assert not inlay.adapters(model)["sum"].trainable


@settings(max_examples=20)
@given(st.lists(st.tuples(Ranks, Weights), min_size=1, max_size=3), st.integers(1, 8))
def test_svd_is_the_nearest_of_its_rank(parts: list[tuple[int, float]], rank: int) -> None:
    model = model_with([r for r, _ in parts], [4.0] * len(parts))
    weights = {f"a{i}": w for i, (_, w) in enumerate(parts)}
    expected = summed(model, weights)
    report = combine(model, weights, name="sum", how="svd", rank=rank)
    actual = changes(model, "sum")
    for name, dense in expected.items():
        u, s, v = np.linalg.svd(dense.numpy(), full_matrices=False)
        best = torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank])
        assert torch.allclose(actual[name], best, atol=1e-5 * max(1.0, float(s[0]))) or s[rank - 1] - s[rank] < 1e-3
        error = float(np.linalg.norm(s[rank:]) / np.linalg.norm(s))
        spectral = float(s[rank] / s[0]) if rank < len(s) else 0.0
        assert report.sites[name].frobenius == pytest.approx(error, abs=1e-6)
        assert report.sites[name].spectral == pytest.approx(spectral, abs=1e-6)
    if rank >= sum(r for r, _ in parts):
        near(actual, expected, 1e-5)
        assert report.worst < 1e-6


@given(st.integers(1, 5), st.floats(0.5, 8))
def test_negated_and_merged_is_subtracted(rank: int, alpha: float) -> None:
    model = model_with([rank], [alpha])
    expected = {n: -v for n, v in changes(model, "a0").items()}
    before = {n: model.get_submodule(n).weight.detach().clone() for n in ("up", "down")}  # type: ignore[operator]
    combine(model, {"a0": -1.0}, name="minus")
    inlay.merge(model, "minus")
    after = {n: model.get_submodule(n).weight.detach().double() - before[n].double() for n in before}  # type: ignore[operator]
    near(after, expected)


def dense_oracle(how: str, deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """The papers' sums on one long vector an adapter."""
    kept = []
    for delta in deltas:
        size = max(1, round(density * len(delta)))
        least = sorted(delta.abs().tolist(), reverse=True)[size - 1]
        kept.append(torch.tensor([v if abs(v) >= least * (1 - 1e-7) else 0.0 for v in delta.tolist()]).double())
    scaled = [w * k for w, k in zip(weights, kept, strict=True)]
    total = sum(scaled[1:], scaled[0])
    if how == "magnitude":
        return total
    merged = []
    for entry in range(len(total)):
        sign = np.sign(float(total[entry]))
        agree = [float(s[entry]) for s in scaled if np.sign(float(s[entry])) == sign and float(s[entry]) != 0]
        merged.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(merged, dtype=torch.float64)


@settings(max_examples=20)
@given(
    how=st.sampled_from(["ties", "magnitude"]),
    parts=st.lists(st.tuples(Ranks, Weights), min_size=1, max_size=3),
    density=st.floats(0.05, 1),
)
def test_trimming_is_over_the_whole_adapter(how: Any, parts: list[tuple[int, float]], density: float) -> None:
    model = model_with([r for r, _ in parts], [4.0] * len(parts))
    weights = {f"a{i}": w for i, (_, w) in enumerate(parts)}
    deltas = [torch.cat([v.reshape(-1) for v in changes(model, name).values()]) for name in weights]
    expected = dense_oracle(how, deltas, list(weights.values()), density)
    exact = summed(model, weights)
    report = combine(model, weights, name="sum", how=how, rank=6, density=density)  # 6 of at most 6: nothing is lost
    actual = changes(model, "sum")
    flat = torch.cat([v.reshape(-1) for v in actual.values()])
    assert torch.allclose(flat, expected, atol=1e-5 * max(1.0, float(expected.abs().max())))
    for name, error in report.sites.items():
        written = float((actual[name] - exact[name]).norm() / exact[name].norm())
        assert error.frobenius == pytest.approx(written, rel=1e-3, abs=1e-5)


def test_dare_drops_and_rescales() -> None:
    model = model_with([3, 2], [4.0, 4.0])
    one = changes(model, "a0")
    combine(model, {"a0": 1.0}, name="dropped", how="dare", rank=6, density=0.5, seed=3)
    flat, before = (torch.cat([v.reshape(-1) for v in c.values()]) for c in (changes(model, "dropped"), one))
    stays = flat.abs() > 1e-5
    assert 0.3 < float(stays.double().mean()) < 0.7
    assert torch.allclose(flat[stays], 2 * before[stays], atol=1e-5)
    again = combine(model, {"a0": 1.0}, name="again", how="dare", rank=6, density=0.5, seed=3)
    combine(model, {"a0": 1.0}, name="other", how="dare", rank=6, density=0.5, seed=4)
    near(changes(model, "again"), changes(model, "dropped"), 0)
    assert any((changes(model, "other")[n] - changes(model, "again")[n]).abs().max() > 1e-3 for n in one)
    assert again.worst > 0.3
    drawn = []
    for seed in range(200):
        combine(model, {"a0": 1.0}, name="many", how="dare", rank=6, density=0.5, seed=seed)
        drawn.append(changes(model, "many")["up"])
        inlay.detach(model, "many")
    assert (torch.stack(drawn).mean(0) - one["up"]).abs().max() < 0.35 * one["up"].abs().max()  # unbiased


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60), st.floats(0.01, 1), st.integers(1, 59))
def test_threshold_is_the_kth_largest(values: list[float], density: float, cut: int) -> None:
    whole = torch.tensor(values)
    reads = {"a": whole[:cut], "b": whole[cut:]}
    size = max(1, round(density * len(values)))
    assert threshold(reads.__getitem__, ["a", "b"], density) == sorted(whole.abs().tolist(), reverse=True)[size - 1]


def test_places_may_differ() -> None:
    model = model_with([2, 3], [4.0, 4.0], [["up"], ["up", "down"]])
    weights = {"a0": 0.5, "a1": -1.5}
    expected = summed(model, weights)
    report = combine(model, weights, name="sum")
    near(changes(model, "sum"), expected)
    assert {k: e.rank for k, e in report.sites.items()} == {"up": 5, "down": 3}
    combine(model, weights, name="ties", how="ties", density=0.9, rank=6)
