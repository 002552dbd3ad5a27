from __future__ import annotations

import json
import math

import pytest

from inlay.cli.output import stages, write_json


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"a": math.nan, "b": [1.5, math.inf], "c": ("é", None, 3, True)})
    out = capsys.readouterr()
    assert json.loads(out.out) == {"a": None, "b": [1.5, None], "c": ["é", None, 3, True]}
    assert "é" in out.out and out.err == ""


def test_stages_are_silent_when_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with stages(quiet) as report:
            report("texts", 1, 2)
    assert capsys.readouterr() == ("", "")
