"""A batch in which every row has an adapter of its own equals one row at a time, whatever the mixture."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import inlay
from inlay import (
    IA3,
    DoRA,
    Houlsby,
    LoRA,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
)
from inlay.testing.models import ZOO

ADAPTERS: dict[str, Any] = {
    "lora": LoRA(rank=2),
    "everywhere": LoRA(rank=3),
    "dora": DoRA(rank=2),
    "ia3": IA3(),
    "houlsby": Houlsby(bottleneck=2),
    "pfeiffer": Pfeiffer(reduction=8),
    "parallel": ParallelAdapter(bottleneck=2),
    "short": PromptTuning(length=2, init="random"),
    "long": PromptTuning(length=5, init="random"),
    "prefix": PrefixTuning(length=3, projection=None),
}
MODELS = ["llama", "gpt2", "opt", "mixtral", "gpt-neox", "bert", "t5", "bart"]


@cache
def adapted(name: str) -> Any:
    """One model with all adapters, values shaken."""
    model = ZOO[name].build()
    for number, (adapter, method) in enumerate(ADAPTERS.items()):
        where = {"where": "all-linear"} if adapter == "everywhere" else {}
        attached = inlay.attach(model, method, name=adapter, **where)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def alone(model: Any, name: str, batch: dict[str, Tensor], row: int, adapter: str | None) -> Tensor:
    """A row without its padding, on its own, logits of its real tokens (or of its class or targets)."""
    with inlay.use(model, adapter), torch.no_grad():
        logits: Tensor = model(**ZOO[name].row(batch, row)).logits
    return logits[0]


def check(name: str, rows: list[str | None], seed: int, side: Any) -> None:
    specimen, model = ZOO[name], adapted(name)
    batch = specimen.batch(len(rows), seed, True, side)
    labels = batch.pop("labels")
    if specimen.kind == "seq2seq":
        batch["decoder_input_ids"] = labels.clamp(min=0)
    with inlay.use(model, rows), torch.no_grad():
        mixed = model(**batch).logits
    for row, adapter in enumerate(rows):
        got = mixed[row]
        if specimen.task == "causal":
            got = got[batch["attention_mask"][row].bool()]
        expected = alone(model, name, batch, row, adapter)
        error = float((got - expected).abs().max())
        assert error <= 2e-5 * max(1.0, float(expected.abs().max())), (row, adapter, error)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6)
@given(
    rows=st.lists(st.none() | st.sampled_from(list(ADAPTERS)), min_size=1, max_size=4),
    seed=st.integers(0, 20),
    left=st.booleans(),
)
def test_rows_do_not_know_of_each_other(name: str, rows: list[str | None], seed: int, left: bool) -> None:
    side = "left" if left and ZOO[name].kind == "decoder" else "right"
    check(name, rows, seed, side)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@settings(max_examples=4)
@given(
    rows=st.lists(st.none() | st.sampled_from(list(ADAPTERS)), min_size=2, max_size=3),
    seed=st.integers(0, 20),
)
def test_generated_rows_do_not_know_of_each_other(name: str, beams: int, rows: list[str | None], seed: int) -> None:
    specimen, model = ZOO[name], adapted(name)
    batch = specimen.prompts(len(rows), seed, ragged=True)
    options: dict[str, Any] = {"max_new_tokens": 3, "num_beams": beams, "do_sample": False}
    with inlay.use(model, rows):
        mixed = model.generate(**batch, **options)
    for row, adapter in enumerate(rows):
        kept = batch["attention_mask"][row].bool()
        with inlay.use(model, adapter):
            single = model.generate(input_ids=batch["input_ids"][row : row + 1, kept], **options)
        assert mixed[row, -3:].tolist() == single[0, -3:].tolist(), (row, adapter)
