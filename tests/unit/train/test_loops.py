"""An attached model trains unchanged in loops that know nothing of inlay."""

from __future__ import annotations

import copy
import inspect
import types
from pathlib import Path

import pytest
import torch

import inlay
from inlay import LoRA, PrefixTuning, PromptTuning
from inlay.core.contracts.method import Method
from inlay.train import load_base
from tests import tiny

# TRL puts a forward with a fused head in the place of the model's own: prompts must not get lost there.
METHODS = [LoRA(rank=2), PromptTuning(length=3), PrefixTuning(length=3)]


def _frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_plain_pytorch(llama: Path, method: Method) -> None:
    model, tokenizer, _ = load_base(llama)
    adapter = inlay.attach(model, method)
    base = _frozen(model)
    batch = tokenizer([row["text"] for row in tiny.rows("text", 6)], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in adapter.parameters()}
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in base.items())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_forward_put_in_place_of_the_models_own(llama: Path, method: Method) -> None:
    """Replaced or wrapped, before a second adapter or not, copied or not: the adapter is there all the same."""
    model, tokenizer, _ = load_base(llama)
    batch = tokenizer([row["text"] for row in tiny.rows("text", 3)], return_tensors="pt", padding=True)
    base = model.eval()(**batch).logits
    adapter = inlay.attach(model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    expected = model.eval()(**batch).logits
    assert not torch.allclose(expected, base)
    whole, fresh = model.forward, types.MethodType(inspect.unwrap(type(model).forward), model)
    for forward in (fresh, lambda *args, **kwargs: whole(*args, **kwargs)):
        model.forward = forward
        assert list(inspect.signature(model.forward).parameters) == list(inspect.signature(forward).parameters)
        torch.testing.assert_close(model(**batch).logits, expected)
        torch.testing.assert_close(copy.deepcopy(model)(**batch).logits, expected)
        inlay.attach(model, LoRA(rank=1), name="other")
        with inlay.use(model, "default"):
            torch.testing.assert_close(model(**batch).logits, expected)
        inlay.detach(model, "other")
    model.forward = fresh
    inlay.detach(model, "default")
    assert model.forward is fresh
    torch.testing.assert_close(model(**batch).logits, base)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_trl(llama: Path, tmp_path: Path, method: Method) -> None:
    import trl
    from datasets import Dataset

    model, tokenizer, _ = load_base(llama)
    adapter = inlay.attach(model, method)
    base, before = _frozen(model), adapter.digest
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            max_length=tiny.CONTEXT,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(tiny.rows("completion", 48)),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert adapter.digest != before
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in base.items())
    inlay.save(model, "default", tmp_path / "adapter")
    other = load_base(llama).model
    assert inlay.load(other, tmp_path / "adapter").digest == adapter.digest
