"""Bottleneck adapters against the bare base with hooks written from the papers' figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay.core.errors import SelectionError
from inlay.testing import LAWS
from inlay.testing.check import check_law
from inlay.testing.models import ZOO
from tests.golden.hand import agree, close, inputs, numbers, shake, zoo_model

LAYERS = 2
# Which modules' outputs are a sublayer's, before its residual is added; with no dropout, the projection's is.
ATTENTION = {
    "llama": ["model.layers.{}.self_attn.o_proj"],
    "mixtral": ["model.layers.{}.self_attn.o_proj"],
    "gpt2": ["transformer.h.{}.attn.c_proj"],
    "opt": ["model.decoder.layers.{}.self_attn.out_proj"],
    "gpt-neox": ["gpt_neox.layers.{}.attention.dense"],
    "bert": ["bert.encoder.layer.{}.attention.output.dense"],
    "distilbert": ["distilbert.transformer.layer.{}.attention.out_lin"],
    "vit": ["vit.layers.{}.attention.o_proj"],
    "t5": [
        "encoder.block.{}.layer.0.SelfAttention.o",
        "decoder.block.{}.layer.0.SelfAttention.o",
        "decoder.block.{}.layer.1.EncDecAttention.o",
    ],
    "bart": [
        "model.encoder.layers.{}.self_attn.out_proj",
        "model.decoder.layers.{}.self_attn.out_proj",
        "model.decoder.layers.{}.encoder_attn.out_proj",
    ],
}
# (what the feed-forward's input enters, what its output leaves)
FEED_FORWARD = {
    "llama": [("model.layers.{}.mlp", "model.layers.{}.mlp")],
    "mixtral": [("model.layers.{}.mlp", "model.layers.{}.mlp")],
    "gpt2": [("transformer.h.{}.mlp", "transformer.h.{}.mlp")],
    "opt": [("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2")],
    "gpt-neox": [("gpt_neox.layers.{}.mlp", "gpt_neox.layers.{}.mlp")],
    "bert": [("bert.encoder.layer.{}.intermediate", "bert.encoder.layer.{}.output.dense")],
    "distilbert": [("distilbert.transformer.layer.{}.ffn",) * 2],
    "vit": [("vit.layers.{}.mlp", "vit.layers.{}.mlp")],
    "t5": [
        ("encoder.block.{}.layer.1.DenseReluDense",) * 2,
        ("decoder.block.{}.layer.2.DenseReluDense",) * 2,
    ],
    "bart": [
        ("model.encoder.layers.{}.fc1", "model.encoder.layers.{}.fc2"),
        ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    ],
}
Sites = list[tuple[str, str]]


def layered(pairs: list[tuple[str, str]]) -> Sites:
    return [(a.format(layer), b.format(layer)) for a, b in pairs for layer in range(LAYERS)]


def adapters_of(leaves: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, leaf in leaves.items():
        _, site, number = name.split("/")
        found.setdefault(site, {})[number] = leaf
    return found


def matching(own: dict[str, dict[str, Tensor]], path: str) -> dict[str, Tensor]:
    """The stored adapter of a sublayer: at this module, inside it, or at its dropout."""
    parent = path.rpartition(".")[0]
    found = [
        site
        for site in own
        if site == path or site.startswith(path + ".") or site in (f"{parent}.dropout", f"{parent}.resid_dropout")
    ]
    assert len(found) == 1, (path, list(own))
    return own[found[0]]


def bottleneck(own: dict[str, Tensor], x: Tensor, function: Any) -> Tensor:
    inner = function(x @ own["down"].t() + own["down_bias"])
    return inner @ own["up"].t() + own["up_bias"]


def serial(bare: nn.Module, places: list[str], leaves: dict[str, Tensor], function: Any) -> None:
    own = adapters_of(leaves)
    assert len(own) == len(places)
    for path in places:
        numbers_here = matching(own, path)

        def hook(_m: nn.Module, _x: Any, y: Any, n: dict[str, Tensor] = numbers_here) -> Any:
            return y + bottleneck(n, y, function)

        bare.get_submodule(path).register_forward_hook(hook)


def parallel(bare: nn.Module, places: Sites, leaves: dict[str, Tensor], function: Any, scale: float) -> None:
    own = adapters_of(leaves)
    assert len(own) == len(places)
    entered: dict[str, Tensor] = {}
    for entry, exit_ in places:
        numbers_here = matching(own, exit_)

        def before(_m: nn.Module, x: Any, key: str = exit_) -> None:
            entered[key] = x[0]

        def after(_m: nn.Module, _x: Any, y: Any, key: str = exit_, n: dict[str, Tensor] = numbers_here) -> Any:
            return y + scale * bottleneck(n, entered[key], function)

        bare.get_submodule(entry).register_forward_pre_hook(before)
        bare.get_submodule(exit_).register_forward_hook(after)


def attached(name: str, method: Any) -> tuple[Any, inlay.Adapter, dict[str, Tensor]]:
    model: Any = zoo_model(name)
    adapter = shake(inlay.attach(model, method))
    return model, adapter, numbers(adapter)


@pytest.mark.parametrize("name", ATTENTION)
def test_houlsby_sits_behind_attention_and_behind_the_feed_forward(name: str) -> None:
    batch = inputs(name, ragged=name != "vit")
    model, adapter, leaves = attached(name, inlay.Houlsby(bottleneck=3))
    bare: Any = zoo_model(name)
    places = [p.format(layer) for p in ATTENTION[name] for layer in range(LAYERS)]
    places += [exit_ for _, exit_ in layered(FEED_FORWARD[name])]
    serial(bare, places, leaves, F.gelu)
    agree(adapter, model(**batch).logits, bare(**batch).logits, leaves)


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_pfeiffer_sits_behind_the_feed_forward(name: str) -> None:
    batch = inputs(name, ragged=name != "vit")
    model, adapter, leaves = attached(name, inlay.Pfeiffer(reduction=8))
    assert all(own["down"].shape == (4, 32) for own in adapters_of(leaves).values())
    bare: Any = zoo_model(name)
    serial(bare, [exit_ for _, exit_ in layered(FEED_FORWARD[name])], leaves, F.relu)
    agree(adapter, model(**batch).logits, bare(**batch).logits, leaves)


@pytest.mark.parametrize(
    "name, norms",
    [
        ("bert", ["bert.encoder.layer.{}.output.LayerNorm"]),
        ("distilbert", ["distilbert.transformer.layer.{}.output_layer_norm"]),
        ("bart", ["model.encoder.layers.{}.final_layer_norm", "model.decoder.layers.{}.final_layer_norm"]),
    ],
)
def test_pfeiffer_at_a_norm_reads_it_and_adds_in_front_of_it(name: str, norms: list[str]) -> None:
    """MAD-X: the adapter reads norm(s), its residual is the sublayer's output, and the norm comes last."""
    batch, paths = inputs(name, ragged=True), [n.format(layer) for n in norms for layer in range(LAYERS)]
    model: Any = zoo_model(name)
    adapter = shake(inlay.attach(model, inlay.Pfeiffer(reduction=8), where=paths))
    leaves = numbers(adapter)
    bare: Any = zoo_model(name)
    for path, own in adapters_of(leaves).items():
        norm = bare.get_submodule(path)

        def forward(s: Tensor, norm: Any = norm, own: dict[str, Tensor] = own) -> Tensor:
            def normal(x: Tensor) -> Tensor:
                centred = x - x.mean(-1, keepdim=True)
                return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

            return normal(s + bottleneck({n.rpartition(".")[2]: v for n, v in own.items()}, normal(s), F.relu))

        norm.forward = forward
    assert sorted(adapters_of(leaves)) == sorted(paths)
    agree(adapter, model(**batch).logits, bare(**batch).logits, leaves)


@pytest.mark.parametrize(
    "name, where", [("bert", "norms"), ("llama", "norms"), ("llama", "block_output"), ("t5", "block_output")]
)
def test_laws_of_pfeiffer_at_other_places(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inlay.Pfeiffer, "default_where", where)
    for law_name, law in LAWS.items():
        check_law(ZOO[name], inlay.Pfeiffer(reduction=2), law_name, law)


def test_pfeiffer_at_norms_over_channels() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    images, norm = torch.randn(2, 3, 6, 6), plain[1]
    expected = plain[0](images)
    adapter = shake(inlay.attach(plain, inlay.Pfeiffer(reduction=2), where=["1"]))
    own = {n.rpartition(".")[2]: t for n, t in adapter.tensors().items()}
    pixels = F.group_norm(expected, 2, norm.weight, norm.bias).permute(0, 2, 3, 1)
    moved = expected + bottleneck(own, pixels, F.relu).permute(0, 3, 1, 2)
    close(plain(images), F.group_norm(moved, 2, norm.weight, norm.bias))


def test_pfeiffer_is_not_put_at_norms_over_batches() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(SelectionError, match="running statistics of whole batches"):
        inlay.attach(plain, inlay.Pfeiffer(reduction=2), where=["1"])


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_parallel_reads_what_enters_the_feed_forward(name: str) -> None:
    batch = inputs(name, ragged=name != "vit")
    model, adapter, leaves = attached(name, inlay.ParallelAdapter(bottleneck=3, scale=2.5, nonlinearity="silu"))
    bare: Any = zoo_model(name)
    parallel(bare, layered(FEED_FORWARD[name]), leaves, F.silu, 2.5)
    agree(adapter, model(**batch).logits, bare(**batch).logits, leaves)


@pytest.mark.parametrize(
    "name, dropouts",
    [
        ("bert", ["bert.encoder.layer.{}.attention.output.dropout", "bert.encoder.layer.{}.output.dropout"]),
        ("gpt2", ["transformer.h.{}.attn.resid_dropout", "transformer.h.{}.mlp.dropout"]),
    ],
)
def test_in_training_the_adapter_reads_what_dropout_left(
    name: str, dropouts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Houlsby's figure: projection, dropout, adapter, residual; with torch's masks, which the bare model has too."""
    monkeypatch.setattr("inlay.kernels.dropout.applies", lambda *_: False)
    monkeypatch.setattr("inlay.kernels.flash.drops", lambda *_, **__: False)
    batch = inputs(name)

    def with_dropout() -> Any:
        model = zoo_model(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        return model.train()

    model = with_dropout()
    adapter = shake(inlay.attach(model, inlay.Houlsby(bottleneck=3)))
    leaves = numbers(adapter)
    bare = with_dropout()
    serial(bare, [d.format(layer) for d in dropouts for layer in range(LAYERS)], leaves, F.gelu)
    torch.manual_seed(7)
    actual = model(**batch).logits
    torch.manual_seed(7)
    expected = bare(**batch).logits
    agree(adapter, actual, expected, leaves)


def test_starting_points_are_those_of_the_code_that_made_the_results() -> None:
    torch.manual_seed(0)

    def start(method: Any) -> dict[str, Tensor]:
        model = ZOO["bert"].build()
        adapter = inlay.attach(model, method)
        own = adapters_of(numbers(adapter))
        return {
            number: torch.cat([n[number].detach().flatten() for n in own.values()])
            for number in ("down", "up", "down_bias", "up_bias")
        }

    houlsby = start(inlay.Houlsby(bottleneck=64))
    for matrix in ("down", "up"):
        assert houlsby[matrix].abs().max() <= 2e-3  # truncated at two standard deviations
        assert 0.8e-3 < houlsby[matrix].std() < 0.95e-3
    pfeiffer = start(inlay.Pfeiffer(reduction=1))
    assert abs(pfeiffer["down"].std() - 0.02) < 2e-3
    beside = start(inlay.ParallelAdapter(bottleneck=64))
    assert beside["down"].abs().max() <= 1 / 32**0.5
    assert not beside["up"].any()
    for method in (houlsby, pfeiffer, beside):
        assert not method["down_bias"].any() and not method["up_bias"].any()
