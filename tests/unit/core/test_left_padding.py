"""Rows on the left-padded side stay independent of their padding when prompts stand in front."""

from __future__ import annotations

from typing import Any

import pytest

import inlay
from inlay.testing.models import ZOO
from tests.golden.hand import close, inputs, shake


def attached(name: str) -> tuple[Any, inlay.Adapter]:
    model = ZOO[name].build()
    return model, shake(inlay.attach(model, inlay.PromptTuning(length=3)))


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "qwen3", "mixtral"])
def test_padding_on_the_left_without_positions_changes_nothing(name: str) -> None:
    """Rotary models do not mind where a row starts, so the prompt's distance from the text must not vary."""
    batch = inputs(name, ragged=True, side="left")
    del batch["position_ids"]
    model, _ = attached(name)
    together = model(**batch).logits
    for row in range(3):
        kept = batch["attention_mask"][row].bool()
        alone = model(input_ids=batch["input_ids"][row : row + 1, kept]).logits
        close(together[row, kept], alone[0])


def test_padding_on_the_left_of_an_encoder_with_relative_positions() -> None:
    batch = inputs("t5", ragged=True, side="left")
    model, _ = attached("t5")
    together = model(**batch).logits
    for row in range(3):
        kept = batch["attention_mask"][row].bool()
        decoder = batch["decoder_input_ids"][row : row + 1]
        alone = model(input_ids=batch["input_ids"][row : row + 1, kept], decoder_input_ids=decoder).logits
        close(together[row], alone[0])
