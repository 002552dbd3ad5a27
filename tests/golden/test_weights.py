"""LoRA, DoRA, (IA)³ and BitFit against the bare base with its weights replaced by the papers' formulas.

The formulas are dense and differentiable; outputs and the gradients of every trained number must agree, and
the places must be the papers' on every architecture.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay.kernels import low_rank
from inlay.testing.models import ZOO
from tests.golden.dense import check, dense, sites
from tests.golden.hand import agree, close, inputs, numbers, shake, with_weights, zoo_model
from tests.golden.places import PLACES, places, rows_of


@pytest.mark.parametrize("name", PLACES)
def test_lora_is_a_low_rank_sum_on_query_and_value(name: str) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + 5.0 / 2 * own["b"] @ own["a"], b

    check(name, inlay.LoRA(rank=2, alpha=5.0), set(places(name, "query", "value")), change)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rank_stabilised_lora_divides_by_the_root(name: str) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + 5.0 / 2 * own["b"] @ own["a"], b  # rank 4: √4

    method = inlay.LoRA(rank=4, alpha=5.0, rank_stabilised=True)
    check(name, method, set(places(name, "query", "value")), change)


@pytest.mark.parametrize("name", PLACES)
def test_dora_is_a_magnitude_times_a_direction_with_a_constant_norm(name: str) -> None:
    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turned = w + 3.0 / 2 * own["b"] @ own["a"]
        norm = turned.square().sum(1, keepdim=True).sqrt().detach()
        return own["magnitude"][:, None] * turned / norm, b

    expected = set(places(name, "query", "key", "value", "up", "down"))
    check(name, inlay.DoRA(rank=2, alpha=3.0), expected, change)


@pytest.mark.parametrize("name", PLACES)
def test_ia3_scales_keys_values_and_what_enters_the_second_matrix(name: str) -> None:
    expected_sites = set(places(name, "key", "value", "down"))
    batch = inputs(name, ragged=name != "vit")
    model: Any = zoo_model(name)
    adapter = shake(inlay.attach(model, inlay.IA3()))
    leaves = numbers(adapter)
    assert set(sites(leaves)) == expected_sites

    def change(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = own["scale"]
        if w.shape[1] in (56, 128):  # only a second feed-forward matrix is this wide (BLOOM: 128)
            return w * scale, b
        return w * scale[:, None], None if b is None else b * scale

    expected = dense(name, leaves, batch, change)
    agree(adapter, model(**batch).logits, expected, leaves, tolerance=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3", "bloom"])
def test_ia3_leaves_the_queries_of_a_fused_matrix_alone(name: str) -> None:
    model: Any = zoo_model(name)
    path = PLACES[name]["query"][0].format(0).partition(":")[0]
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    batch = inputs(name)
    model(**batch)
    hook.remove()
    adapter = inlay.attach(model, inlay.IA3())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(3.0)
    hook = model.get_submodule(path).register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    model(**batch)
    hook.remove()
    before, after = seen
    for part, factor in (("query", 1), ("key", 3), ("value", 3)):
        rows = rows_of(name, f"x:{part}")
        assert rows is not None
        close(after[..., rows], factor * before[..., rows])


def test_lora_on_an_embedding_is_a_low_rank_table() -> None:
    batch = inputs("llama", ragged=True)
    model: Any = ZOO["llama"].build()
    adapter = shake(inlay.attach(model, inlay.LoRA(rank=2, alpha=3.0), where=["embed_tokens"]))
    leaves = numbers(adapter)
    own = sites(leaves)["model.embed_tokens"]

    def change(name: str, value: Tensor) -> Tensor:
        if name != "model.embed_tokens.weight":
            return value
        return value + 3.0 / 2 * (own["b"] @ own["a"]).t()

    expected = with_weights(ZOO["llama"].build(), change, batch).logits
    real = batch["attention_mask"].bool()
    agree(adapter, model(**batch).logits[real], expected[real], leaves)


def test_lora_on_a_tied_embedding_leaves_the_output_head_alone() -> None:
    batch = inputs("qwen3")
    model: Any = ZOO["qwen3"].build()
    adapter = shake(inlay.attach(model, inlay.LoRA(rank=2, alpha=3.0), where=["embed_tokens"]))
    leaves = numbers(adapter)
    own = sites(leaves)["model.embed_tokens"]
    bare: Any = ZOO["qwen3"].build()
    table = bare.model.embed_tokens.weight.detach() + 3.0 / 2 * (own["b"] @ own["a"]).t()
    embedded = F.embedding(batch["input_ids"], table)
    expected = bare(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
    agree(adapter, model(**batch).logits, expected, leaves)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (lambda: nn.Conv1d(3, 5, 3, padding=1), (2, 3, 9)),
        (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2), (2, 3, 12, 10)),
        (lambda: nn.Conv2d(3, 5, (1, 3), padding="same", bias=False), (2, 3, 6, 5)),
        (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    ],
)
def test_lora_on_a_convolution_is_a_low_rank_kernel(layer: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer())
    adapter = shake(inlay.attach(model, inlay.LoRA(rank=2, alpha=3.0), where=["0"]))
    leaves = numbers(adapter)
    own = sites(leaves)["0"]
    x = torch.randn(shape)
    base: Any = model[0]
    kernel = base.weight.detach()
    # Each output channel's kernel is a mixture of `rank` kernels.
    update = torch.einsum("or,ri...->oi...", own["b"], own["a"])
    convolve: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[kernel.dim() - 2]
    bias = None if base.bias is None else base.bias.detach()
    expected = convolve(x, kernel + 1.5 * update, bias, base.stride, base.padding, base.dilation)
    agree(adapter, model(x), expected, leaves)


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "gpt-neox", "bart", "vit", "deberta-v2", "bloom"])
def test_bitfit_adds_to_every_bias_and_to_nothing_else(name: str) -> None:
    batch = inputs(name, ragged=name != "vit")
    model: Any = zoo_model(name)
    adapter = shake(inlay.attach(model, inlay.BitFit()))
    leaves = numbers(adapter)
    biases = {n for n, _ in zoo_model(name).named_parameters() if n.endswith("bias")}
    assert {site + ".bias" for site in sites(leaves)} == biases

    def change(parameter: str, value: Tensor) -> Tensor:
        return value + leaves[f"delta/{parameter.removesuffix('.bias')}/offset"] if parameter in biases else value

    expected = with_weights(zoo_model(name), change, batch).logits
    agree(adapter, model(**batch).logits, expected, leaves)


def test_bitfit_is_refused_where_there_are_no_biases() -> None:
    with pytest.raises(inlay.UserError, match="bias"):
        inlay.attach(ZOO["llama"].build(), inlay.BitFit())


# -- dropout ----------------------------------------------------------------------------------------


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4))


def test_the_dropout_of_lora_touches_the_update_only() -> None:
    model, x = linear(), torch.randn(50, 6)
    base: Any = model[0]
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    adapter = shake(inlay.attach(model, inlay.LoRA(rank=2, alpha=2.0, dropout=0.5), where=["0"]))
    own = sites(numbers(adapter))["0"]
    model.train()
    torch.manual_seed(3)
    actual = model(x)
    torch.manual_seed(3)  # masks come from a generator that one draw has seeded
    dropped = low_rank._dropped(x, int(torch.randint(2**62, ())), 0.5) * 2
    assert 0.3 < float((dropped == 0).float().mean()) < 0.7
    close(actual, x @ weight.t() + bias + dropped @ own["a"].t() @ own["b"].t())
    model.eval()
    close(model(x), x @ weight.t() + bias + x @ own["a"].t() @ own["b"].t())


def test_the_dropout_of_dora_reaches_the_base_path() -> None:
    model, x = linear(), torch.randn(50, 6)
    base: Any = model[0]
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    adapter = shake(inlay.attach(model, inlay.DoRA(rank=2, alpha=2.0, dropout=0.5), where=["0"]))
    leaves = numbers(adapter)
    own = sites(leaves)["0"]
    model.train()
    torch.manual_seed(3)
    actual = model(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    turned = weight + own["b"] @ own["a"]
    expected = dropped @ (own["magnitude"][:, None] * turned / turned.norm(dim=1, keepdim=True).detach()).t()
    agree(adapter, actual, expected + bias, leaves)


def test_the_dropout_of_dora_at_its_start_still_drops_the_base_path() -> None:
    model, x = linear(), torch.ones(400, 6)
    base: Any = model[0]
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    inlay.attach(model, inlay.DoRA(rank=2, dropout=0.5), where=["0"])
    model.train()
    spread = model(x).std(dim=0)
    close(spread, weight.square().sum(1).sqrt(), tolerance=0.15)  # each input is 0 or 2 with equal chance
    model.eval()
    close(model(x), x @ weight.t() + bias)


# -- starting points --------------------------------------------------------------------------------


def test_starting_points_are_the_papers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.Embedding(50, 40))
    base: Any = model[0]
    own = sites(numbers(inlay.attach(model, inlay.LoRA(rank=8), name="lora", where=["0"])))["0"]
    bound = 1 / 20  # Kaiming-uniform with a = √5 is uniform in ±1/√in
    assert own["a"].abs().max() <= bound and own["a"].abs().max() > 0.98 * bound
    assert torch.equal(own["b"], torch.zeros(300, 8))
    own = sites(numbers(inlay.attach(model, inlay.LoRA(rank=8), name="table", where=["1"])))["1"]
    assert torch.equal(own["a"], torch.zeros(8, 50))
    close(own["b"].std(), torch.tensor(1.0), tolerance=0.15)
    own = sites(numbers(inlay.attach(model, inlay.DoRA(rank=8), name="dora", where=["0"])))["0"]
    close(own["magnitude"], base.weight.norm(dim=1))
    assert torch.equal(own["b"], torch.zeros(300, 8))
    own = sites(numbers(inlay.attach(model, inlay.IA3(), name="ia3", where=["0"])))["0"]
    assert torch.equal(own["scale"], torch.ones(300))
