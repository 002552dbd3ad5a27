"""Combining on whole models: every kind of adapter, refusals, and a model that a failure leaves as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.arithmetic import combine
from inlay.core.errors import AdapterNameError, ConfigError, SelectionError, UnsupportedError
from inlay.testing.models import ZOO


def two(name: str, *methods: Any, **options: Any) -> Any:
    """A zoo model with shaken adapters ``a``, ``b``, …"""
    torch.manual_seed(0)
    model: Any = ZOO[name].build()
    for letter, method in zip("abc", methods, strict=False):
        adapter = inlay.attach(model, method, name=letter, **options)
        generator = torch.Generator().manual_seed(ord(letter))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def merged(model: Any, name: str) -> dict[str, Tensor]:
    """Every parameter of the base while `name` is merged, minus the parameter before, double precision."""
    roster = model.__dict__["_inlay_roster"]
    own = {id(p) for adapter in roster.adapters.values() for p in adapter.parameters()}

    def values() -> dict[str, Tensor]:
        named = model.named_parameters(remove_duplicate=False)
        return {n: p.detach().double().clone() for n, p in named if id(p) not in own}

    before = values()
    inlay.merge(model, name)
    after = values()
    inlay.unmerge(model)
    return {n: after[n] - before[n] for n in before}


def check_sum(model: Any, weights: dict[str, float], **options: Any) -> Any:
    report = combine(model, weights, name="sum", **options)
    each = {name: merged(model, name) for name in weights}
    actual = merged(model, "sum")
    for name, value in actual.items():
        expected = torch.stack([w * each[a][name] for a, w in weights.items()]).sum(0)
        assert (value - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max())), name
    assert any(v.abs().max() > 1e-2 for v in actual.values())
    return report


WEIGHTS = {"a": 0.7, "b": -0.3}


@pytest.mark.parametrize(
    ("specimen", "method", "options"),
    [
        ("llama", inlay.LoRA(rank=2), {}),
        ("llama", inlay.AdaLoRA(rank=3, target_rank=2), {}),
        ("llama", inlay.DyLoRA(rank=3), {}),
        ("llama", inlay.VeRA(rank=8), {}),
        ("gpt2", inlay.LoRA(rank=2), {}),  # parts of a fused matrix
        ("bert", inlay.LoRA(rank=2), {"where": ["word_embeddings", "query"]}),
        ("llama", inlay.IA3(), {}),
        ("bert", inlay.IA3(), {}),  # biases are rescaled with their layers
        ("bert", inlay.BitFit(), {}),
        ("llama", inlay.TopLayers(), {}),
        ("llama", inlay.FullFineTuning(), {}),
    ],
)
def test_sums_are_exact(specimen: str, method: Any, options: dict[str, Any]) -> None:
    report = check_sum(two(specimen, method, method, **options), WEIGHTS)
    assert report.worst < 1e-3
    own = {"ia3", "bitfit", "top-layers", "full"}
    assert report.method == (type(method).name if type(method).name in own else "lora")


@pytest.mark.parametrize("key", [k for k, cls in inlay.methods().items() if not cls.needs_data])
def test_every_method_is_summed_exactly_or_refused(key: str) -> None:
    for method in inlay.methods()[key].examples():
        for specimen in ("llama", "bert"):
            try:
                model = two(specimen, method, method)
            except (UnsupportedError, SelectionError):
                continue  # not for this model
            try:
                check_sum(model, WEIGHTS)
            except UnsupportedError as error:
                assert f"({key})" in str(error)
                assert set(inlay.adapters(model)) == {"a", "b"}


def test_outputs_of_different_low_rank_methods_add_up() -> None:
    model = two("llama", inlay.LoRA(rank=2), inlay.PiSSA(rank=3), inlay.LoRA(rank=4, rank_stabilised=True))
    report = check_sum(model, {"a": 0.5, "b": 0.25, "c": -1.0})
    assert report.method == "lora" and {e.rank for e in report.sites.values()} == {
        2 * 3,
        2 + 2 * 3 + 4,
    }  # PiSSA is everywhere


def test_what_has_no_factors_is_compressed_and_the_error_said() -> None:
    options = {"where": ["q_proj", "v_proj"]}
    model = two("llama", inlay.DoRA(rank=2), inlay.LoRA(rank=2), **options)
    with pytest.raises(UnsupportedError, match=r"'a' \(dora\) has no factors .* how='svd'"):
        combine(model, WEIGHTS, name="sum")
    with pytest.raises(UnsupportedError, match="has no rank of its own"):
        combine(model, WEIGHTS, name="sum", how="svd")
    reports = [combine(model, WEIGHTS, name=f"r{rank}", how="svd", rank=rank) for rank in (2, 8, 16)]
    worst = [report.worst for report in reports]
    assert worst[0] > worst[1] > worst[2]
    each = {name: merged(model, name) for name in ("a", "b", "r8")}
    for site, error in reports[1].sites.items():
        exact = 0.7 * each["a"][f"{site}.weight"] - 0.3 * each["b"][f"{site}.weight"]
        written = float((each["r8"][f"{site}.weight"] - exact).norm() / exact.norm())
        assert error.frobenius == pytest.approx(written, abs=1e-4)
    check_sum(model, WEIGHTS, how="svd", rank=32)


def test_ties_of_differences_is_the_papers() -> None:
    """On task vectors of the base's own parameters, entry by entry."""
    model = two("llama", inlay.TopLayers(), inlay.TopLayers())
    vectors = [merged(model, name) for name in "ab"]
    combine(model, {"a": 1.0, "b": 1.0}, name="ties", how="ties", density=0.3)
    names = [n for n, v in vectors[0].items() if v.abs().max() > 0]
    flat = [torch.cat([v[n].reshape(-1) for n in names]) for v in vectors]
    trimmed = [v * (v.abs() >= v.abs().sort(descending=True).values[round(0.3 * len(v)) - 1]) for v in flat]
    sign = (trimmed[0] + trimmed[1]).sign()
    agreeing = torch.stack([v * (v.sign() == sign) for v in trimmed])
    expected = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    actual = torch.cat([merged(model, "ties")[n].reshape(-1) for n in names])
    assert ((actual - expected).abs() > 1e-5).double().mean() < 1e-3  # rounding moves an entry across the threshold


def test_differences_of_other_structure_become_one_sparse_difference(tmp_path: Any) -> None:
    """Masks that differ, and whole parameters beside them."""
    model = ZOO["llama"].build()
    fish = inlay.methods()["fish-mask"]
    for seed, (name, method) in enumerate(
        (("a", fish.examples()[0]), ("b", fish.examples()[0]), ("c", inlay.TopLayers()))
    ):
        data = [ZOO["llama"].batch(rows=2, seed=seed)] if method.needs_data else None
        adapter = inlay.attach(model, method, name=name, data=data)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.2)
    report = check_sum(model, {"a": 0.7, "b": -0.3})
    assert report.method == "lt-sft" and report.worst < 1e-6
    kept = inlay.adapters(model)["sum"].count
    assert max(inlay.adapters(model)[n].count for n in "ab") < kept <= 2 * inlay.adapters(model)["a"].count
    inlay.save(model, "sum", tmp_path)
    digest = inlay.adapters(model)["sum"].digest
    inlay.detach(model, "sum")
    assert inlay.load(model, tmp_path, name="again").digest == digest
    check_sum(model, {"a": 1.0, "c": 2.0})
    trimmed = combine(model, {"a": 1.0, "c": 2.0}, name="trimmed", how="ties", density=0.2)
    assert 0 < trimmed.worst < 1.5
    with pytest.raises(UnsupportedError, match="the sum is zero"):
        combine(model, {"a": 0.0, "c": 0.0}, name="none")


def test_heads_are_summed_as_differences() -> None:
    model = two("llama-classifier", inlay.LoRA(rank=2), inlay.LoRA(rank=2), modules_to_save=["score"])
    check_sum(model, WEIGHTS)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (inlay.PromptTuning(length=3), r"'b' \(prompt-tuning\) is a prompt"),
        (inlay.PrefixTuning(length=3), r"'b' \(prefix-tuning\) is a prompt"),
        (inlay.Pfeiffer(reduction=4), r"'b' \(pfeiffer\) acts on activations"),
        (inlay.TopLayers(), "low-rank factors cannot represent"),
    ],
)
def test_what_cannot_be_summed_is_refused_by_name(method: Any, words: str) -> None:
    model = two("llama", inlay.LoRA(rank=2), method)
    with pytest.raises(UnsupportedError, match=words):
        combine(model, WEIGHTS, name="sum", how="svd", rank=2)
    assert set(inlay.adapters(model)) == {"a", "b"}


def test_a_bias_does_not_fit_into_factors() -> None:
    model = two("bert", inlay.BitFit(), inlay.LoRA(rank=2))
    with pytest.raises(UnsupportedError, match=r"'a' \(bitfit\) changes"):
        combine(model, WEIGHTS, name="sum", how="svd", rank=2)


@pytest.mark.parametrize(
    ("weights", "options", "error", "words"),
    [
        ({"a": 1.0}, {"name": "b"}, AdapterNameError, "already on this model"),
        ({"a": 1.0, "bb": 1.0}, {}, AdapterNameError, "no adapter 'bb'"),
        ({"a": float("nan")}, {}, ConfigError, "expected a number"),
        ({}, {}, ConfigError, "no adapter was given"),
        ({"a": 1.0}, {"how": "tie"}, ConfigError, "did you mean 'ties'"),
        ({"a": 1.0}, {"rank": 4}, ConfigError, "leave rank out"),
        ({"a": 1.0}, {"how": "svd", "rank": 0}, ConfigError, "rank is 0"),
        ({"a": 1.0}, {"how": "ties", "density": 0.0}, ConfigError, "density is 0"),
    ],
)
def test_mistakes_leave_no_trace(weights: Any, options: Any, error: type[Exception], words: str) -> None:
    model = two("llama", inlay.LoRA(rank=2), inlay.LoRA(rank=2))
    keys, values = set(model.state_dict()), {n: t.clone() for n, t in model.state_dict().items()}
    batch = ZOO["llama"].batch(rows=2, seed=0)
    before = ZOO["llama"].logits(model(**batch))
    with pytest.raises(error, match=words):
        combine(model, weights, **{"name": "sum", **options})
    assert set(model.state_dict()) == keys and set(inlay.adapters(model)) == {"a", "b"}
    assert all(torch.equal(values[n], t) for n, t in model.state_dict().items())
    assert torch.equal(ZOO["llama"].logits(model(**batch)), before)


@pytest.mark.parametrize("method", [inlay.LoRA(rank=2), inlay.IA3()])
def test_what_diverged_is_refused(method: Any) -> None:
    """An error of NaN hides among others, and a model of NaN is no merged one."""
    model = two("llama", method, method)
    with torch.no_grad():
        list(inlay.adapters(model)["b"].parameters())[1].view(-1)[0] = float("nan")
    for what in (lambda: combine(model, WEIGHTS, name="sum"), lambda: inlay.merge(model, "b")):
        with pytest.raises(UnsupportedError, match="not finite"):
            what()
    assert set(inlay.adapters(model)) == {"a", "b"}
    inlay.merge(model, "a")


def test_a_layer_whose_name_is_the_end_of_anothers() -> None:
    """A rank that is meant for one of them is not the other's."""
    model = torch.nn.ModuleDict({"inner": torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})})
    model["proj"] = torch.nn.Linear(8, 8)
    for rank_pattern in ({"inner.proj": 3}, {"inner.proj": 2, "proj": 4}):
        inlay.attach(model, inlay.LoRA(rank=2, rank_pattern=rank_pattern), name="a", where=["proj"])
        for parameter in inlay.adapters(model)["a"].parameters():
            torch.nn.init.normal_(parameter)
        report = combine(model, {"a": 1.0}, name="sum")
        ranks = {key: site.rank for key, site in report.sites.items()}
        assert ranks == {"inner.proj": rank_pattern["inner.proj"], "proj": rank_pattern.get("proj", 2)}
        for name, value in merged(model, "sum").items():
            torch.testing.assert_close(value, merged(model, "a")[name], atol=1e-5, rtol=1e-5)
        inlay.detach(model, "sum")
        inlay.detach(model, "a")


def test_what_a_bias_loses_is_said() -> None:
    """In bfloat16 a bias is rounded like a weight."""
    model = ZOO["bert"].build().bfloat16()
    adapter = inlay.attach(model, inlay.BitFit(), name="a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape) * 1e-3)
    report = inlay.merge(model, "a")
    assert 1e-5 < report.worst < 0.1 and max(report.lost.values()) > 0.1


def test_a_failure_while_installing_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.core import install

    model = two("llama", inlay.LoRA(rank=2), inlay.LoRA(rank=2))
    keys = set(model.state_dict())

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(install, "_place", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        combine(model, WEIGHTS, name="sum")
    assert set(model.state_dict()) == keys and set(inlay.adapters(model)) == {"a", "b"}


def test_combining_draws_nothing_from_the_global_generator_and_is_stored(tmp_path: Any) -> None:
    model = two("llama", inlay.LoRA(rank=2), inlay.LoRA(rank=3))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    combine(model, WEIGHTS, name="sum", how="dare", density=0.7)
    assert torch.equal(torch.rand(3), expected)
    inlay.save(model, "sum", tmp_path)
    digest = inlay.adapters(model)["sum"].digest
    inlay.detach(model, "sum")
    assert inlay.load(model, tmp_path).digest == digest


def test_large_dense_changes_take_the_randomised_road(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.arithmetic import low_rank

    monkeypatch.setattr(low_rank, "DENSE_LIMIT", 0)
    torch.manual_seed(0)
    exact = torch.randn(200, 5).double() @ torch.randn(5, 300).double()
    assert torch.allclose(low_rank.factorise(exact, 5).dense(), exact, atol=1e-8)
    noisy = exact + 0.1 * torch.randn(200, 300).double()
    sizes = torch.linalg.svdvals(noisy)
    error = float((low_rank.factorise(noisy, 5).dense() - noisy).norm())
    assert error == pytest.approx(float(sizes[5:].norm()), rel=1e-6)
