"""Which methods are refused on which models, pinned: a refusal is never a way around the laws."""

from __future__ import annotations

import pytest

from inlay.methods import registry
from inlay.testing import ZOO, refusal

# Models without a single bias.
UNBIASED = {"llama", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "t5"}
# Models that compute attention in their own code.
CLOSED = {"bloom", "deberta-v2", "sequential"}
# Sliding windows of 8 tokens, which a prompt and 12 tokens outgrow.
WINDOWED = {"gemma2", "gemma3"}
# No text to put a prompt in front of; 5 outputs, which no block divides.
PLAIN = {"sequential"}

# Methods that are not named are refused nowhere.
REFUSED: dict[str, set[str]] = {
    "bitfit": UNBIASED,
    "trainable-tokens": {"vit"} | PLAIN,
    "loreft": PLAIN,
    "prompt-tuning": {"bloom", "vit"} | WINDOWED | PLAIN,
    "p-tuning": {"bloom", "vit"} | WINDOWED | PLAIN,
    "multitask-prompt": {"bloom", "vit"} | WINDOWED | PLAIN,
    "prefix-tuning": CLOSED,
    "llama-adapter": CLOSED,
    "ladder": PLAIN,
    "compacter": PLAIN,
    "stack": PLAIN,
    "in-parallel": CLOSED,
    "average": PLAIN,
    "mam": CLOSED,
    "unipelt": CLOSED,
    "fusion": PLAIN,
    "fish-mask": PLAIN,  # no loss, so no gradients to choose by
}


def test_only_known_methods_and_models_are_named() -> None:
    assert set(REFUSED) <= set(registry()) and set().union(*REFUSED.values()) <= set(ZOO)


@pytest.mark.parametrize("specimen", ZOO.values(), ids=ZOO)
@pytest.mark.parametrize("key", registry())
def test_refused_where_expected_and_nowhere_else(key: str, specimen: object) -> None:
    method = registry()[key]
    reasons = [refusal(specimen, example) for example in method.examples()]  # type: ignore[arg-type]
    expected = specimen.name in REFUSED.get(key, ())  # type: ignore[attr-defined]
    refused = [reason for reason in reasons if reason is not None]
    # The members of a composition differ in what they need, those of another method's examples do not.
    enough = len(refused) > 0 if method.family == "composition" else len(refused) == len(reasons)
    assert enough if expected else not refused, refused or f"{key} was attached to {specimen}"
    assert all(len(reason) > 40 for reason in refused), "a refusal says what to do"
