"""The zoo itself: what the laws rest on."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from inlay.testing.models import ZOO
from inlay.testing.specimen import IGNORED_LABEL, Side, Specimen, _mould

EVERY = pytest.mark.parametrize("specimen", ZOO.values(), ids=ZOO.keys())
PADDED = pytest.mark.parametrize(
    ("specimen", "side"),
    [pytest.param(s, side, id=f"{s.name}-{side}") for s in ZOO.values() for side in s.padding_sides],
)
GENERATING = pytest.mark.parametrize(
    "specimen", [pytest.param(s, id=s.name) for s in ZOO.values() if s.supports_generate]
)


def test_every_kind_is_there() -> None:
    assert {s.kind for s in ZOO.values()} == {"decoder", "encoder", "seq2seq", "vision", "plain"}
    assert len(ZOO) >= 14


@EVERY
def test_every_parameter_is_random(specimen: Specimen) -> None:
    for name, parameter in specimen.build().named_parameters():
        values = parameter.detach().flatten()
        if values.numel() > 1:
            assert values.std() > 1e-3, f"{name} is constant"
        assert not (values == 0).any(), f"{name} holds zeros"
        assert not (values == 1).any(), f"{name} holds ones"


@EVERY
def test_building_again_gives_the_same_values_in_a_model_of_its_own(specimen: Specimen) -> None:
    first = specimen.build()
    _mould.cache_clear()
    second = specimen.build()
    assert not first.training
    for (name, a), (other, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other
        assert a is not b and torch.equal(a, b), name
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert next(specimen.build().parameters()).any(), "a change reached the cached model"


def test_building_leaves_the_random_state_alone() -> None:
    _mould.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    ZOO["llama"].build()
    assert torch.equal(torch.rand(4), expected)


@EVERY
def test_logits_are_of_order_one_and_differ_by_row(specimen: Specimen) -> None:
    with torch.no_grad():
        logits = specimen.logits(specimen.build()(**specimen.batch(3, seed=0)))
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 3
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


@EVERY
def test_every_parameter_gets_a_gradient(specimen: Specimen) -> None:
    model = specimen.build()
    batch = specimen.batch(3, seed=0)
    output = model(**batch)
    loss = output.loss if "labels" in batch else output.square().mean()
    assert loss.isfinite()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@EVERY
def test_a_batch_is_the_same_each_time_and_row_by_row(specimen: Specimen) -> None:
    four, again, two = (specimen.batch(rows, seed=7) for rows in (4, 4, 2))
    for key, value in four.items():
        assert torch.equal(value, again[key])
        assert torch.equal(value[:2], two[key])
    assert not torch.equal(*(next(iter(specimen.batch(2, seed=s).values())) for s in (0, 1)))


@PADDED
def test_a_padded_row_equals_the_row_alone(specimen: Specimen, side: Side) -> None:
    model = specimen.build()
    batch = specimen.batch(4, seed=1, ragged=True, padding_side=side)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2
    with torch.no_grad():
        together = specimen.logits(model(**batch))
        for index in range(4):
            alone = specimen.logits(model(**specimen.row(batch, index)))[0]
            expected, real = _scored(specimen, batch, index, together[index], alone)
            torch.testing.assert_close(real, expected, atol=1e-5, rtol=1e-5)


def _scored(
    specimen: Specimen, batch: dict[str, Tensor], index: int, together: Tensor, alone: Tensor
) -> tuple[Tensor, Tensor]:
    """Both logits at the positions that are no padding."""
    if specimen.task == "causal":
        return together[batch["attention_mask"][index].bool()], alone
    if specimen.task == "seq2seq":
        kept = batch["labels"][index] != IGNORED_LABEL
        return together[kept], alone[kept]
    return together, alone


@pytest.mark.parametrize("specimen", [s for s in ZOO.values() if not s.padding_sides], ids=lambda s: s.name)
def test_ragged_rows_of_a_model_without_padding_raise(specimen: Specimen) -> None:
    with pytest.raises(ValueError, match=f"'{specimen.name}' has no padding"):
        specimen.batch(2, seed=0, ragged=True)


@GENERATING
def test_generation_is_as_long_as_asked(specimen: Specimen) -> None:
    prompts = specimen.prompts(3, seed=0, ragged=True)
    generated = specimen.build().generate(**prompts, max_new_tokens=4, do_sample=False)
    before = prompts["input_ids"].shape[1] if specimen.kind == "decoder" else 1
    assert generated.shape == (3, before + 4)


def test_prompts_of_a_classifier_raise() -> None:
    with pytest.raises(ValueError, match="does not generate"):
        ZOO["bert"].prompts(2, seed=0)


@EVERY
def test_position_ids_are_announced(specimen: Specimen) -> None:
    if specimen.takes_positions:
        assert "position_ids" in inspect.signature(specimen.build().forward).parameters


def test_another_type_keeps_the_buffers() -> None:
    model = ZOO["llama"].build(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    batch = ZOO["llama"].batch(2, seed=0)
    assert ZOO["llama"].logits(model(**batch)).dtype is torch.bfloat16


def test_the_shapes_that_make_methods_stumble_are_there() -> None:
    from transformers.pytorch_utils import Conv1D

    def types(name: str) -> set[type[nn.Module]]:
        return {type(module) for module in ZOO[name].build().modules()}

    assert Conv1D in types("gpt2")
    assert nn.Conv2d in types("vit") & types("sequential")
    assert any(p.dim() == 3 for p in ZOO["mixtral"].build().parameters())
    assert ZOO["llama"].build().config.num_key_value_heads == 2
    # OPT flattens (rows, tokens) before its feed-forward layers.
    model = ZOO["opt"].build()
    seen: list[torch.Size] = []
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape))
    model(**ZOO["opt"].batch(3, seed=0))
    assert seen == [torch.Size([36, 32])]
