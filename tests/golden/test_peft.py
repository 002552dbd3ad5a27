"""Hugging Face PEFT 0.21 with the same numbers gives the same logits."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import inlay
from tests.golden.hand import close, inputs, numbers, shake, zoo_model

TARGETS = {
    "llama": (["q_proj", "v_proj"], "CAUSAL_LM"),
    "bert": (["query", "value"], None),
    "t5": (["q", "v"], "SEQ_2_SEQ_LM"),
    "opt": (["q_proj", "v_proj"], "CAUSAL_LM"),
}


def attached(name: str, method: Any, **where: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = zoo_model(name)
    adapter = shake(inlay.attach(model, method, **where))
    return model, {n: t.detach() for n, t in numbers(adapter).items()}


def filled(name: str, config: Any, values: dict[str, Tensor]) -> Any:
    """PEFT's model with every trained parameter set from `values`, each used once."""
    model = peft.get_peft_model(zoo_model(name), config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"base_model.model.{n}" for n in values}
    with torch.no_grad():
        for parameter, value in values.items():
            trained[f"base_model.model.{parameter}"].copy_(value)
    return model.eval()


def compare(name: str, ours: Any, theirs: Any) -> None:
    batch = inputs(name, ragged=True)
    with torch.no_grad():
        actual, expected = ours(**batch).logits, theirs(**batch).logits
    if actual.shape[:2] == batch["attention_mask"].shape:
        real = batch["attention_mask"].bool()
        actual, expected = actual[real], expected[real]
    close(actual, expected)


def low_rank(values: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "a": "lora_A.default.weight",
        "b": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    }
    found = {}
    for stored, value in values.items():
        _, site, number = stored.split("/")
        found[f"{site}.{names[number]}"] = value
    return found


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_lora(name: str, stabilised: bool) -> None:
    targets, task = TARGETS[name]
    ours, values = attached(name, inlay.LoRA(rank=4, alpha=6.0, rank_stabilised=stabilised))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type=task, use_rslora=stabilised)
    compare(name, ours, filled(name, config, low_rank(values)))


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_dora(name: str) -> None:
    targets, task = TARGETS[name]
    ours, values = attached(name, inlay.DoRA(rank=4, alpha=6.0), where=["query", "value"])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type=task, use_dora=True)
    compare(name, ours, filled(name, config, low_rank(values)))


@pytest.mark.parametrize(
    "name, targets, feed_forward, task",
    [
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"], "CAUSAL_LM"),
        ("opt", ["k_proj", "v_proj", "fc2"], ["fc2"], "CAUSAL_LM"),
        ("bert", r".*(attention\.self\.(key|value)|\d\.output\.dense)", r".*\d\.output\.dense", None),
        ("t5", ["k", "v", "wo"], ["wo"], "SEQ_2_SEQ_LM"),
    ],
)
def test_ia3(name: str, targets: Any, feed_forward: Any, task: str | None) -> None:
    ours, values = attached(name, inlay.IA3())
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feed_forward, task_type=task)
    shaped = {}
    for stored, value in values.items():
        site = stored.split("/")[1]
        inner = value.shape[0] == 56  # PEFT keeps a row for what enters, a column for what leaves
        shaped[f"{site}.ia3_l.default"] = value[None] if inner else value[:, None]
    compare(name, ours, filled(name, config, shaped))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompt_tuning(name: str) -> None:
    ours, values = attached(name, inlay.PromptTuning(length=3))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(zoo_model(name), config).eval()
    (vectors,) = [p for p in theirs.parameters() if p.requires_grad]
    vectors.data.copy_(values["prompt/prompt/vectors"])
    batch = inputs(name, ragged=True)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        close(ours(**batch).logits[real], theirs(**batch).logits[:, 3:][real])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefix_tuning(name: str) -> None:
    ours, values = attached(name, inlay.PrefixTuning(length=3, projection=None))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=False)
    theirs = peft.get_peft_model(zoo_model(name), config).eval()
    (table,) = [p for p in theirs.parameters() if p.requires_grad]
    (ours_table,) = values.values()
    table.data.copy_(ours_table)
    batch = inputs(name, ragged=True)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        close(ours(**batch).logits[real], theirs(**batch).logits[real])
