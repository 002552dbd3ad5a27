"""Every law for every method on every model of the zoo."""

from __future__ import annotations

import pytest

from inlay.core.method import Method
from inlay.methods import registry
from inlay.testing import LAWS, ZOO, Specimen, refusal
from inlay.testing.check import check_law

EXAMPLES = [pytest.param(e, id=f"{key}{i}") for key, cls in registry().items() for i, e in enumerate(cls.examples())]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("specimen", ZOO.values(), ids=ZOO)
@pytest.mark.parametrize("method", EXAMPLES)
def test_law(method: Method, specimen: Specimen, law: str) -> None:
    reason = refusal(specimen, method)
    if reason is not None:
        pytest.skip(reason)  # test_refusals pins which these are
    check_law(specimen, method, law, LAWS[law])
