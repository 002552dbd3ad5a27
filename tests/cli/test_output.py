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


def test_lesser_columns_make_room(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is squeezed: columns are whole, or left out and named."""
    rows = [("trainable-tokens", "representation", "1,024")]
    for width, gone in ((80, []), (44, ["family"]), (26, ["family", "count"])):
        monkeypatch.setenv("COLUMNS", str(width))
        show_table("Title", ("method", "family", "count"), rows, wrapped=(), lesser=("family", "count"))
        out = capsys.readouterr().out
        assert "trainable-tokens" in out and max(map(len, out.splitlines())) <= max(width, 50)
        assert ("representation" in out) == ("family" not in gone) and ("1,024" in out) == ("count" not in gone)
        assert (f"without {', '.join(gone)}" in " ".join(out.split())) == bool(gone)


def test_stages_are_silent_when_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with stages(quiet) as report:
            report("texts", 1, 2)
    assert capsys.readouterr() == ("", "")
