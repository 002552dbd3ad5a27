"""What is kept between forwards is old after an optimizer's step, also where the step counts no versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay.testing.laws import train
from inlay.testing.models import ZOO

METHODS: dict[str, Any] = {
    "lora": inlay.LoRA(rank=2),
    "dora": inlay.DoRA(rank=2),
    "oft": inlay.OFT(block_size=4),
    "boft": inlay.BOFT(block_size=4),
    "ia3": inlay.IA3(),
    "prompt-tuning": inlay.PromptTuning(length=3),
    "p-tuning": inlay.PTuning(length=3),
    "prefix-tuning": inlay.PrefixTuning(length=3),
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("key", METHODS)
def test_a_step_is_seen(key: str, fused: bool, mixed: bool) -> None:
    specimen = ZOO["llama"]
    model, batch = specimen.build(), specimen.batch(2, 0)
    adapter = inlay.attach(model, METHODS[key], name="one")
    train(adapter)
    inlay.attach(model, inlay.LoRA(rank=2), name="two")
    choice = ["one", "two"] if mixed else "one"

    def first_row() -> torch.Tensor:
        with torch.no_grad(), inlay.use(model, choice):
            return model(**batch).logits[0].clone()

    first_row(), first_row()  # whatever can be kept is kept
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=fused)
    with inlay.use(model, "one"):
        model(**batch).loss.backward()
    optimizer.step()
    found = first_row()

    fresh = specimen.build()
    again = inlay.attach(fresh, METHODS[key], name="one")
    with torch.no_grad():
        for name, tensor in again.tensors().items():
            tensor.copy_(adapter.tensors()[name])
        expected = fresh(**batch).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("key", METHODS)
def test_forwards_in_autocast_and_outside_share_nothing(key: str, mixed: bool) -> None:
    specimen = ZOO["llama"]
    batch = {name: t for name, t in specimen.batch(2, 0).items() if name != "labels"}

    def attached() -> Any:
        torch.manual_seed(0)
        model = specimen.build()
        train(inlay.attach(model, METHODS[key], name="one"))
        train(inlay.attach(model, METHODS[key], name="two"))
        return model

    def logits(model: Any, enabled: bool) -> torch.Tensor:
        chosen = inlay.use(model, ["one", "two"] if mixed else "one")
        with torch.no_grad(), chosen, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return model(**batch).logits.clone()  # type: ignore[no-any-return]

    both = attached()
    for enabled in (True, False, True):
        assert torch.equal(logits(both, enabled), logits(attached(), enabled))


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("whole", [False, True])
def test_models_and_adapters_made_in_inference_mode(key: str, whole: bool) -> None:
    """Their tensors count no versions: nothing is kept of them, and a change in place is seen."""
    specimen = ZOO["llama"]
    batch = {name: t for name, t in specimen.batch(2, 0).items() if name != "labels"}
    with torch.inference_mode(whole):
        model = specimen.build()
    with torch.inference_mode():
        inlay.attach(model, METHODS[key], name="one")
        inlay.attach(model, METHODS[key], name="two")
        for seed in range(2):
            for adapter in inlay.adapters(model).values():
                for parameter in adapter.parameters():
                    parameter.normal_(std=0.3)
            with inlay.use(model, ["one", "two"]):
                mixed = model(**batch).logits
            for row, name in enumerate(("one", "two")):
                with inlay.use(model, name):
                    alone = model(**{n: t[row : row + 1] for n, t in batch.items()}).logits
                real = batch["attention_mask"][row].bool()
                torch.testing.assert_close(mixed[row][real], alone[0][real], atol=1e-4, rtol=1e-4, msg=f"{name} {seed}")
