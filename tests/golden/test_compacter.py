"""Compacter against the bare base with hooks whose matrices are the paper's sums of Kronecker products, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import inlay
from inlay import Compacter
from inlay.testing.models import ZOO
from tests.golden.dense import sites
from tests.golden.hand import agree, inputs, numbers, shake, zoo_model
from tests.golden.test_bottleneck import ATTENTION, FEED_FORWARD, LAYERS, layered, matching

CROSS = ("EncDecAttention", "encoder_attn")


def behind_attention(name: str) -> list[str]:
    patterns = [p for p in ATTENTION[name] if not any(word in p for word in CROSS)]
    return [p.format(layer) for p in patterns for layer in range(LAYERS)]


def behind_feed_forward(name: str) -> list[str]:
    return [exit_ for _, exit_ in layered(FEED_FORWARD[name])]


def summed(own: dict[str, Tensor], which: str) -> Tensor:
    """Σᵢ Aᵢ ⊗ (sᵢ tᵢᵀ), element by element: (in, out)."""
    rules, left, right = own["rules.rules"], own[f"{which}_left"], own[f"{which}_right"]
    total = None
    for rule, s, t in zip(rules, left, right, strict=True):
        block = s @ t
        term = torch.cat([torch.cat([value * block for value in row], dim=1) for row in rule])
        total = term if total is None else total + term
    assert total is not None
    return total


def serial(bare: nn.Module, places: list[str], leaves: dict[str, Tensor], function: Any) -> None:
    own = sites(leaves)
    assert len(own) == len(places)
    for path in places:
        here = matching(own, path)

        def hook(_m: nn.Module, _x: Any, y: Any, n: dict[str, Tensor] = here) -> Any:
            inner = function(y @ summed(n, "down") + n["down_bias"])
            return y + inner @ summed(n, "up") + n["up_bias"]

        bare.get_submodule(path).register_forward_hook(hook)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def compare(name: str, method: Compacter, places: list[str], function: Any, **where: Any) -> None:
    batch = inputs(name, ragged=name != "vit")
    model: Any = zoo_model(name)
    adapter = shake(inlay.attach(model, method, **where), 0.5)
    leaves = numbers(adapter)
    bare: Any = zoo_model(name)
    serial(bare, places, leaves, function)
    agree(adapter, model(**batch).logits, bare(**batch).logits, leaves, tolerance=2e-5)


@pytest.mark.parametrize("name", ATTENTION)
def test_compacter_sits_behind_self_attention_and_the_feed_forward(name: str) -> None:
    places = behind_attention(name) + behind_feed_forward(name)
    compare(name, Compacter(reduction=4), places, tanh_gelu)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_compacter_plus_plus_sits_behind_the_feed_forward_alone(name: str) -> None:
    compare(name, Compacter(reduction=4), behind_feed_forward(name), tanh_gelu, where="mlp_sublayer")


@pytest.mark.parametrize("rank, divisions, reduction", [(3, 2, 4), (2, 8, 4), (1, 1, 2)])
def test_other_ranks_and_divisions(rank: int, divisions: int, reduction: int) -> None:
    method = Compacter(rank=rank, divisions=divisions, reduction=reduction, nonlinearity="relu")
    compare("opt", method, behind_attention("opt") + behind_feed_forward("opt"), F.relu)


def test_all_layers_and_both_projections_share_one_set_of_rules() -> None:
    model = ZOO["bert"].build()
    adapter = inlay.attach(model, Compacter(reduction=4))
    shared = {n: tuple(t.shape) for n, t in adapter.tensors().items() if n.startswith("shared/")}
    assert shared == {"shared/rules/rules": (4, 4, 4)}
    assert sum(p.shape == (4, 4, 4) for p in adapter.parameters()) == 1


def test_starting_points_are_those_of_the_official_configurations() -> None:
    torch.manual_seed(0)
    own = sites(numbers(inlay.attach(nn.Sequential(nn.Linear(8, 2048)), Compacter(), where=["0"])))["0"]
    assert own["down_left"].shape == (4, 512, 1) and own["down_right"].shape == (4, 1, 16)
    for name in ("down_left", "down_right", "up_left", "up_right"):
        _, rows, columns = own[name].shape
        bound = (2 * 6 / (rows + columns)) ** 0.5  # Glorot-uniform with gain √2, matrix by matrix
        assert 0.9 * bound < own[name].abs().max() <= bound
    assert 0.7e-4 < own["rules.rules"].std() < 1.3e-4
    assert not own["down_bias"].any() and not own["up_bias"].any()


@pytest.mark.parametrize("where, percent", [(None, 0.073), ("mlp_sublayer", 0.047)])
def test_shares_of_t5_base_are_the_papers(where: str | None, percent: float) -> None:
    """Table 1, which counts the layer norms that both train as well."""
    config = transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    everything = sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for n, p in model.named_parameters() if "layer_norm" in n)
    adapter = inlay.attach(model, Compacter(), where=where)
    layers = 48 if where is None else 24
    down, up = 4 * (192 + 6) + 24, 4 * (6 + 192) + 768
    assert adapter.count == layers * (down + up) + 64
    assert round(100 * (adapter.count + norms) / everything, 3) == percent


def test_sizes_that_do_not_divide_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 48), nn.Linear(48, 30))
    with pytest.raises(inlay.UserError, match="1 has 30 outputs") as caught:
        inlay.attach(model, Compacter(reduction=4), where=["0", "1"])
    assert "0 has" not in str(caught.value) and "reduction" in str(caught.value)
    with pytest.raises(inlay.UserError, match="bottleneck of 0"):
        inlay.attach(model, Compacter(reduction=64, divisions=1), where=["0"])
    for wrong in ({"divisions": 0}, {"reduction": 0}, {"rank": 0}, {"nonlinearity": "swoosh"}):
        with pytest.raises(inlay.UserError):
            Compacter(**wrong)  # type: ignore[arg-type]
