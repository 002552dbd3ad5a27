"""Every law for every method on every model of the zoo; `covering.py` says what is left to `-m exhaustive`."""

from __future__ import annotations

import traceback
from collections.abc import Collection

import pytest

import inlay
from inlay.core.contracts.method import Method
from inlay.methods import registry
from inlay.testing import LAWS, ZOO, Specimen, refusal
from inlay.testing.check import check_law
from tests.laws.covering import ABOUT_RUNNING, ARCHITECTURES, KINDS, left_out, one_of_each_make

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
LEFT_OUT = [
    pytest.param(cls.examples()[0], ZOO[name], id=f"{key}-{name}")
    for key, cls in registry().items()
    for name in ARCHITECTURES
    if name not in KINDS
]


# Without the fast paths the laws hold for the plain formulas: every method on a decoder, and on more by `exhaustive`.
PLAIN = [
    pytest.param(cls.examples()[0], ZOO[name], id=f"{key}-{name}", marks=[pytest.mark.exhaustive] * (name != "llama"))
    for key, cls in registry().items()
    for name in ("llama", *OF_EACH_KIND)
]


@pytest.mark.parametrize(("method", "specimen"), CASES)
def test_laws(method: Method, specimen: Specimen) -> None:
    hold_all(method, specimen, LAWS.keys() - left_out(method, specimen))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "specimen"), LEFT_OUT)
def test_laws_that_others_cover(method: Method, specimen: Specimen) -> None:
    hold_all(method, specimen, left_out(method, specimen))


@pytest.mark.parametrize(("method", "specimen"), PLAIN)
def test_laws_without_fast_paths(method: Method, specimen: Specimen) -> None:
    with inlay.fast_paths(False):
        hold_all(method, specimen, LAWS)


def hold_all(method: Method, specimen: Specimen, laws: Collection[str]) -> None:
    reason = refusal(specimen, method)
    if reason is not None:
        pytest.skip(reason)  # test_refusals pins which these are
    broken = []
    for name in (law for law in LAWS if law in laws):
        try:
            check_law(specimen, method, name, LAWS[name])
        except Exception:  # all that do not hold are said at once
            broken.append(f"{name}: {traceback.format_exc(limit=-4)}")
    assert not broken, "\n".join(broken)


def test_there_are_enough_architectures() -> None:
    assert set(ARCHITECTURES) <= set(ZOO) and len(ARCHITECTURES) >= 12


def test_what_is_left_out_is_covered() -> None:
    """Each kind of model is there, the laws are laws, and those that stand for others are made of all there is."""
    assert {ZOO[name].kind for name in KINDS} == {s.kind for s in ZOO.values()}
    assert set(LAWS) > ABOUT_RUNNING
    standing = one_of_each_make()
    assert 10 <= len(standing) < len(registry())
    kinds = {sort[0] for made in standing for sort in made}
    assert kinds == {"linear", "norm", "embedding", "output", "tokens", "keys and values", "difference"}
