"""Multitask prompt tuning against embeddings made by hand, and what tasks share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import inlay
from inlay.core.errors import AdapterFileError, ConfigError
from inlay.testing.models import ZOO
from tests.golden.hand import agree, close, inputs, numbers, shake, zoo_model

SHARED, OWN = "shared/prompt/vectors", "prompt/prompt/"


def before(name: str, virtual: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The bare model's logits with embeddings in front of the text, unpadded rows."""
    model: Any = zoo_model(name)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    whole = torch.cat([virtual.expand(embeds.shape[0], -1, -1), embeds], dim=1)
    rest = {k: v for k, v in batch.items() if k == "decoder_input_ids"}
    logits: Tensor = model(inputs_embeds=whole, **rest).logits
    return logits if rest else logits[:, virtual.shape[0] :]


def product(leaves: dict[str, Tensor]) -> Tensor:
    """P̂ = P* ∘ (u vᵀ), a number at a time."""
    u, v = leaves[OWN + "columns"].flatten(), leaves[OWN + "rows"].flatten()
    return leaves[SHARED] * torch.einsum("i,j->ij", u, v)


def tasks(name: str = "llama", length: int = 3) -> Any:
    torch.manual_seed(0)
    model = zoo_model(name)
    inlay.attach(model, inlay.MultitaskPromptTuning(length=length), name="a")
    inlay.attach(model, inlay.MultitaskPromptTuning(length=length, shared_with="a"), name="b")
    for adapter in inlay.adapters(model).values():
        shake(adapter, 0.2)
    return model


def common(model: Any, name: str) -> Tensor:
    (found,) = (p for p in inlay.adapters(model)[name].parameters() if p.shape[0] > 1 and p.shape[1] > 1)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "t5"])
def test_equals_the_product(name: str) -> None:
    batch, model = inputs(name), zoo_model(name)
    adapter = shake(inlay.attach(model, inlay.MultitaskPromptTuning(length=4)))
    leaves = numbers(adapter)
    agree(adapter, model(**batch).logits, before(name, product(leaves), batch), leaves, tolerance=2e-5)


def test_a_mixed_batch_trains_what_the_tasks_share() -> None:
    """One batch of two tasks gives P* the sum of both gradients, and each task's vectors their own."""
    model, batch = tasks(), inputs("llama", rows=2)
    a, b = (inlay.adapters(model)[n] for n in "ab")
    assert common(model, "a") is common(model, "b")
    assert sum(id(p) == id(common(model, "a")) for p in model.parameters()) == 1
    leaves = {"a": numbers(a), "b": numbers(b)}
    leaves["b"][SHARED] = leaves["a"][SHARED]
    expected = torch.cat(
        [before("llama", product(leaves[n]), {k: v[i : i + 1] for k, v in batch.items()}) for i, n in enumerate("ab")]
    )
    with inlay.use(model, ["a", "b"]):
        actual = model(**batch).logits
    close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    for adapter in (a, b):
        by_address = {p.data_ptr(): p for p in adapter.parameters()}
        for name, value in adapter.tensors().items():
            gradient = by_address[value.data_ptr()].grad
            assert gradient is not None
            close(gradient, leaves[adapter.name][name].grad, 1e-4)  # type: ignore[arg-type]


def test_a_new_task_begins_with_the_common_prompt_as_it_is() -> None:
    model, batch = ZOO["llama"].build(), inputs("llama")
    shake(inlay.attach(model, inlay.MultitaskPromptTuning(length=3), name="a"))
    inlay.attach(model, inlay.MultitaskPromptTuning(length=3, shared_with="a"), name="b")
    leaves = numbers(inlay.adapters(model)["b"])
    assert torch.equal(leaves[SHARED], numbers(inlay.adapters(model)["a"])[SHARED])
    assert bool((leaves[OWN + "rows"] == 1).all()) and bool((leaves[OWN + "columns"] == 1).all())
    close(model(**batch).logits, before("llama", leaves[SHARED], batch))


def test_the_first_begins_with_common_words() -> None:
    model: Any = ZOO["llama"].build()
    adapter = inlay.attach(model, inlay.MultitaskPromptTuning(length=6))
    table = model.get_input_embeddings().weight
    assert all(bool((row == table).all(1).any()) for row in adapter.tensors()[SHARED])


@pytest.mark.parametrize("first", ["a", "b"])
def test_detaching_one_leaves_the_other(first: str) -> None:
    model, batch = tasks(), inputs("llama")
    other = "b" if first == "a" else "a"
    with inlay.use(model, other):
        expected = model(**batch).logits
    inlay.detach(model, first)
    with inlay.use(model, other):
        assert torch.equal(model(**batch).logits, expected)
    inlay.detach(model, other)
    assert "_inlay_roster" not in model.__dict__


def test_a_copied_model_shares_among_its_own() -> None:
    model = tasks()
    twin = copy.deepcopy(model)
    assert common(twin, "a") is common(twin, "b")
    assert common(twin, "a") is not common(model, "a")


def test_files_hold_everything(tmp_path: Path) -> None:
    """Alone, a task has a copy of its own; loaded beside its partner, they share again."""
    model, batch = tasks(), inputs("llama")
    outputs = {}
    for name in "ab":
        inlay.save(model, name, tmp_path / name)
        with inlay.use(model, name), torch.no_grad():
            outputs[name] = model(**batch).logits
    alone = ZOO["llama"].build()
    inlay.load(alone, tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(alone(**batch).logits, outputs["b"])  # type: ignore[operator]
    both = ZOO["llama"].build()
    inlay.load(both, tmp_path / "a", trainable=True)
    inlay.load(both, tmp_path / "b")
    assert common(both, "a") is common(both, "b")
    assert common(both, "a").requires_grad, "loading one task froze the other"
    for name in "ab":
        with inlay.use(both, name), torch.no_grad():
            assert torch.equal(both(**batch).logits, outputs[name])  # type: ignore[operator]


def test_a_file_never_changes_what_another_task_holds(tmp_path: Path) -> None:
    model = tasks()
    for name in "ab":
        inlay.save(model, name, tmp_path / name)
    other = ZOO["llama"].build()
    a = shake(inlay.load(other, tmp_path / "a"))
    digest = a.digest
    with pytest.raises(AdapterFileError, match="saved together"):
        inlay.load(other, tmp_path / "b")
    assert a.digest == digest and list(inlay.adapters(other)) == ["a"]


def test_peft() -> None:
    """PEFT multiplies in the same way, with one adapter for all tasks."""
    import peft

    model = tasks()
    config = peft.MultitaskPromptTuningConfig(
        num_tasks=2, num_ranks=1, num_virtual_tokens=3, token_dim=32, num_transformer_submodules=1, num_layers=2,
        prompt_tuning_init="RANDOM",
    )  # fmt: skip
    theirs = peft.tuners.multitask_prompt_tuning.MultitaskPromptEmbedding(config, torch.nn.Embedding(5, 32))
    each = [numbers(inlay.adapters(model)[n]) for n in "ab"]
    theirs.load_state_dict(
        {
            "embedding.weight": each[0][SHARED],
            "prefix_task_cols": torch.stack([e[OWN + "columns"] for e in each]),
            "prefix_task_rows": torch.stack([e[OWN + "rows"] for e in each]),
        }
    )
    expected = theirs(torch.arange(3).expand(2, -1), torch.tensor([0, 1]))
    for i, leaves in enumerate(each):
        close(product(leaves), expected[i], 1e-6)


def test_count() -> None:
    """A prompt of 100 for T5 base: 76,800 and, for each task, 868."""
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=768, num_layers=1))
    assert inlay.attach(model, inlay.MultitaskPromptTuning(length=100, init="random")).count == 76_800 + 868


def test_refusals() -> None:
    model = ZOO["llama"].build()
    with pytest.raises(ConfigError, match="no attached adapter"):
        inlay.attach(model, inlay.MultitaskPromptTuning(length=3, shared_with="a"))
    assert "_inlay_roster" not in model.__dict__
    inlay.attach(model, inlay.MultitaskPromptTuning(length=4), name="a")
    with pytest.raises(ConfigError, match="3 virtual tokens"):
        inlay.attach(model, inlay.MultitaskPromptTuning(length=3, shared_with="a"), name="b")
