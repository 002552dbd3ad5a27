from __future__ import annotations

import pytest

from inlay.cli.generate import paired
from inlay.core.errors import ConfigError


def test_pairs_of_prompts_and_adapters() -> None:
    assert paired(["a", "b"], []) == (["a", "b"], [None, None])
    assert paired(["a", "b"], ["x"]) == (["a", "b"], ["x", "x"])
    assert paired(["a", "b"], ["x", "none"]) == (["a", "b"], ["x", None])
    assert paired(["a"], ["x", "y", "none"]) == (["a", "a", "a"], ["x", "y", None])


def test_counts_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="2 adapters for 3 prompts"):
        paired(["a", "b", "c"], ["x", "y"])
