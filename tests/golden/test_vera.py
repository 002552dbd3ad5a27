"""VeRA against the bare base with W + Λ_b B Λ_d A in place of W, and against Hugging Face PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay import VeRA
from inlay.testing.models import ZOO
from tests.golden.dense import check, sites
from tests.golden.hand import close, numbers, shake
from tests.golden.places import PLACES, places
from tests.golden.test_peft import TARGETS, attached, compare, filled


def updated(own: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    out, inner = w.shape
    first, second = own["projections.a"][:, :inner], own["projections.b"][:out]
    return w + torch.diag(own["b"]) @ second @ torch.diag(own["d"]) @ first, b


@pytest.mark.parametrize("name", PLACES)
def test_vera_is_two_vectors_around_a_shared_pair(name: str) -> None:
    check(name, VeRA(rank=5), set(places(name, "query", "value")), updated)


def test_layers_of_all_sizes_share_one_pair_of_the_largest() -> None:
    roles = ("query", "value", "up", "down")
    check("llama", VeRA(rank=5), set(places("llama", *roles)), updated, where=list(roles))
    model = ZOO["llama"].build()
    adapter = inlay.attach(model, VeRA(rank=5), where=list(roles))
    stored = adapter.tensors()
    assert {n: tuple(t.shape) for n, t in stored.items() if n.startswith("shared/")} == {
        "shared/projections/a": (5, 56),
        "shared/projections/b": (56, 5),
    }
    assert adapter.count == 2 * (4 * 5 + 32 + 16 + 56 + 32)  # the pair is not trained
    assert all(p.dim() == 1 for p in model.parameters() if p.requires_grad)


def test_starting_points_are_the_papers() -> None:
    model = nn.Sequential(nn.Linear(400, 300))
    adapter = inlay.attach(model, VeRA(rank=64), where=["0"])
    own = sites(numbers(adapter))["0"]
    assert torch.equal(own["d"], torch.full((64,), 0.1))
    assert torch.equal(own["b"], torch.zeros(300))
    for matrix, fan_in in ((own["projections.a"], 400), (own["projections.b"], 64)):
        bound = (6 / fan_in) ** 0.5  # Kaiming-uniform
        assert 0.98 * bound < matrix.abs().max() <= bound
        close(matrix.mean(), torch.tensor(0.0), tolerance=0.02)


def test_the_pair_depends_on_the_seed_alone() -> None:
    def pair(seed: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        adapter = inlay.attach(nn.Sequential(nn.Linear(8, 6)), VeRA(rank=4, seed=seed), where=["0"])
        return adapter.tensors()["shared/projections/a"]

    assert torch.equal(pair(0, 1), pair(0, 2))
    assert not torch.equal(pair(0, 1), pair(1, 1))


def test_training_leaves_the_pair_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    adapter = inlay.attach(model, VeRA(rank=4), where=["0"])
    before = {n: t.clone() for n, t in adapter.tensors().items()}
    optimizer = torch.optim.SGD(adapter.parameter_groups(0.1))
    for _ in range(3):
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
    after = adapter.tensors()
    assert {n for n in after if not torch.equal(after[n], before[n])} == {"delta/0/d", "delta/0/b"}


def test_dropout_touches_the_update_only() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(50, 6)
    base: Any = model[0]
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    adapter = shake(inlay.attach(model, VeRA(rank=3, dropout=0.5), where=["0"]))
    own = sites(numbers(adapter))["0"]
    model.train()
    torch.manual_seed(3)
    actual = model(x)
    torch.manual_seed(3)
    low = F.dropout(x, 0.5) @ own["projections.a"].t() * own["d"]
    close(actual, x @ weight.t() + bias + low @ own["projections.b"].t() * own["b"])


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_peft_with_the_same_vectors_and_key_gives_the_same_logits(name: str) -> None:
    import peft

    targets, task = TARGETS[name]
    ours, values = attached(name, VeRA(rank=6, seed=3))
    config = peft.VeraConfig(r=6, projection_prng_key=3, target_modules=targets, task_type=task)
    vectors = {}
    for stored, value in values.items():
        kind, site, number = stored.split("/")
        if kind == "delta":
            vectors[f"{site}.vera_lambda_{number}.default"] = value
    theirs = filled(name, config, vectors)
    compare(name, ours, theirs)
    assert torch.equal(theirs.base_model.vera_A["default"], values["shared/projections/a"])
    assert torch.equal(theirs.base_model.vera_B["default"], values["shared/projections/b"])
