"""Norm tuning against the bare model with changed norm parameters, and against Hugging Face PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import inlay
from inlay.core.errors import SelectionError
from inlay.testing.models import ZOO
from tests.golden.hand import agree, close, inputs, numbers, shake, with_weights, zoo_model

MODELS = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "bert", "t5", "bart", "vit", "sequential"]
STORED = {"weight": "gain", "bias": "offset"}


@pytest.mark.parametrize("name", MODELS)
def test_equals_changed_weights(name: str) -> None:
    batch = inputs(name, ragged=ZOO[name].kind not in ("vision", "plain"))
    model = zoo_model(name)
    where = (lambda path, module: "Norm" in type(module).__name__) if name == "sequential" else None
    adapter = shake(inlay.attach(model, inlay.NormTuning(), where=where))
    leaves = numbers(adapter)
    used = set()

    def changed(parameter: str, value: torch.Tensor) -> torch.Tensor:
        path, _, kind = parameter.rpartition(".")
        stored = f"delta/{path}/{STORED.get(kind, kind)}"
        if stored not in leaves:
            return value
        used.add(stored)
        return value + leaves[stored]

    expected = with_weights(zoo_model(name), changed, batch)
    assert used == set(leaves)
    logits = ZOO[name].logits
    agree(adapter, logits(model(**batch)), logits(expected), leaves, tolerance=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_a_fresh_adapter_changes_no_bit_of_a_half_precision_model(name: str) -> None:
    batch, model = inputs(name), ZOO[name].build(dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(**batch).logits
        adapter = inlay.attach(model, inlay.NormTuning())
        assert torch.equal(model(**batch).logits, before)
        shake(adapter, 1e-1)
        assert not torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_merging_gives_the_sum(name: str) -> None:
    model = zoo_model(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = shake(inlay.attach(model, inlay.NormTuning()))
    inlay.merge(model, "default")
    merged = dict(model.named_parameters())
    for stored, value in adapter.tensors().items():
        _, path, kind = stored.split("/")
        own = f"{path}.{ {v: k for k, v in STORED.items()}[kind] }"
        close(merged[own], before[own] + value, 1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft(name: str) -> None:
    """PEFT keeps whole norms where we keep differences."""
    import peft

    batch = inputs(name, ragged=True)
    ours: Any = zoo_model(name)
    adapter = shake(inlay.attach(ours, inlay.NormTuning()))
    targets = [p for p, m in zoo_model(name).named_modules() if type(m).__name__.endswith("Norm")]
    theirs = peft.get_peft_model(zoo_model(name), peft.LNTuningConfig(target_modules=targets, task_type="CAUSAL_LM"))
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter.tensors())
    with torch.no_grad():
        for stored, value in adapter.tensors().items():
            _, path, kind = stored.split("/")
            own = {v: k for k, v in STORED.items()}[kind]
            trained[f"base_model.model.{path}.ln_tuning_layers.default.{own}"].add_(value)
        actual, expected = ours(**batch).logits, theirs.eval()(**batch).logits
    real = batch["attention_mask"].bool()
    close(actual[real], expected[real])


def test_counts() -> None:
    """BERT base has 25 LayerNorms of 768; Llama of the 7B shape has 65 RMSNorms of 4,096."""
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128))
    assert inlay.attach(bert, inlay.NormTuning()).count == 25 * 2 * 768
    assert inlay.attach(llama, inlay.NormTuning()).count == 65 * 4096


def test_running_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(SelectionError, match="running statistics"):
        inlay.attach(model, inlay.NormTuning())
