from __future__ import annotations

import json
import math

import pytest

from inlay.cli.output import number, show_table, stages, write_json


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"a": math.nan, "b": [1.5, math.inf], "c": ("é", None, 3, True)})
    out = capsys.readouterr()
    assert json.loads(out.out) == {"a": None, "b": [1.5, None], "c": ["é", None, 3, True]}
    assert "é" in out.out and out.err == ""


def test_numbers_for_people() -> None:
    assert [number(1234.56789), number(math.nan), number(math.inf), number(0.5, 1)] == [
        "1,234.5679", "undefined", "infinite", "0.5",
    ]  # fmt: skip


def test_tables_show_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("Title", ("name", "score"), [("[red]x[/red]", 1), ("[/]", 2)], numbers=("score",))
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out and "[/]" in out and "Title" in out


def test_stages_are_silent_when_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with stages(quiet) as report:
            report("texts", 1, 2)
    assert capsys.readouterr() == ("", "")
