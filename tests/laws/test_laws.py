"""Every law for every method on every model of the zoo."""

from __future__ import annotations

import traceback

import pytest

import inlay
from inlay.core.contracts.method import Method
from inlay.methods import registry
from inlay.testing import LAWS, ZOO, Specimen, refusal
from inlay.testing.check import check_law

# `make test` holds every method to every law on these, `-m exhaustive` on their near relations, too.
ARCHITECTURES = (
    "llama", "gemma2", "phi3", "gpt2", "opt", "mixtral", "bloom", "bert", "deberta-v2", "t5", "bart", "vit",
    "sequential",
)  # fmt: skip
# A method's further examples differ in a branch or two, which one model shows; the other kinds are exhaustive.
OF_EACH_KIND = ("gpt2", "bert", "t5", "mixtral", "sequential")


def exhaustive(example: int, specimen: str) -> bool:
    return specimen not in ARCHITECTURES if example == 0 else specimen != "llama"


CASES = [
    pytest.param(
        example, specimen, id=f"{key}{i}-{name}", marks=[pytest.mark.exhaustive] if exhaustive(i, name) else []
    )
    for key, cls in registry().items()
    for i, example in enumerate(cls.examples())
    for name, specimen in ZOO.items()
    if i == 0 or name in ("llama", *OF_EACH_KIND)
]


# Without the fast paths the laws hold for the plain formulas: every method on a decoder, and on more by `exhaustive`.
PLAIN = [
    pytest.param(cls.examples()[0], ZOO[name], id=f"{key}-{name}", marks=[pytest.mark.exhaustive] * (name != "llama"))
    for key, cls in registry().items()
    for name in ("llama", *OF_EACH_KIND)
]


@pytest.mark.parametrize(("method", "specimen"), CASES)
def test_laws(method: Method, specimen: Specimen) -> None:
    hold_all(method, specimen)


@pytest.mark.parametrize(("method", "specimen"), PLAIN)
def test_laws_without_fast_paths(method: Method, specimen: Specimen) -> None:
    with inlay.fast_paths(False):
        hold_all(method, specimen)


def hold_all(method: Method, specimen: Specimen) -> None:
    reason = refusal(specimen, method)
    if reason is not None:
        pytest.skip(reason)  # test_refusals pins which these are
    broken = []
    for name, law in LAWS.items():
        try:
            check_law(specimen, method, name, law)
        except Exception:  # all that do not hold are said at once
            broken.append(f"{name}: {traceback.format_exc(limit=-4)}")
    assert not broken, "\n".join(broken)


def test_there_are_enough_architectures() -> None:
    assert set(ARCHITECTURES) <= set(ZOO) and len(ARCHITECTURES) >= 12
