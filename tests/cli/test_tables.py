"""What people read, at the widths that terminals have."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from inlay.cli.tables import show_facts, show_table, show_text, told, told_number

PLANS = [("prefix-tuning", "low rank", "1,024", "14.8 MiB"), ("lora", "soft prompt", "8", "1.00 TiB")]
COLUMNS = ("method", "family", "trained", "activations")

AT_80 = """\
Training on a base whose name is rather long and stands over a narrow table
┏━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━━┓
┃ method        ┃ family      ┃ trained ┃ activations ┃
┡━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━━┩
│ prefix-tuning │ low rank    │   1,024 │    14.8 MiB │
│ lora          │ soft prompt │       8 │    1.00 TiB │
└───────────────┴─────────────┴─────────┴─────────────┘
"""
AT_48 = """\
Training on a base whose name is rather long and
 stands over a narrow table
┏━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━━┓
┃ method        ┃ family      ┃ activations ┃
┡━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━━━━┩
│ prefix-tuning │ low rank    │    14.8 MiB │
│ lora          │ soft prompt │    1.00 TiB │
└───────────────┴─────────────┴─────────────┘
(without trained: the terminal is narrow)
"""
AT_30 = """\
Training on a base whose name
is rather long and stands over
a narrow table
method       prefix-tuning
family       low rank
trained      1,024
activations  14.8 MiB

method       lora
family       soft prompt
trained      8
activations  1.00 TiB
"""


@pytest.mark.parametrize("width, expected", [(120, AT_80), (80, AT_80), (48, AT_48), (30, AT_30)])
def test_tables(width: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns are whole, or left out and named, or a list: no word and no number is cut."""
    monkeypatch.setenv("COLUMNS", str(width))
    title = "Training on a base whose name is rather long and stands over a narrow table"
    show_table(title, COLUMNS, PLANS, numbers=COLUMNS[2:], whole=COLUMNS[:2], lesser=("trained",))
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        line.strip() for line in expected.splitlines()
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_facts_break_between_words(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    words = [f"gradient_checkpointing_{n}" for n in range(12)]
    facts = {"hyper_parameters": ", ".join(words), "packing": True, "base": None, "layers": [1, 2000], "rate": 1e-4}
    show_facts("Adapter", facts)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width and all(f"{word}" in out for word in words)
    lines = [" ".join(line.strip("│ ").replace("│", " ").split()) for line in out.splitlines()]
    assert {"packing yes", "base none", "layers 1, 2,000", "rate 0.0001"} <= set(lines)


def test_values_are_not_pythons() -> None:
    values = [None, True, False, 1234567, 0.5, 2.0, [1, 2], (), {"alpha": 16.0, "rank_pattern": {}}, {"method": "lora"}]
    assert [told(value) for value in values] == [
        "none", "yes", "no", "1,234,567", "0.5", "2", "1, 2", "none", "alpha 16, rank pattern none", "lora",
    ]  # fmt: skip
    assert [told_number(1234.56789, 4), told_number(math.nan), told_number(math.inf), told_number(0.5, 1)] == [
        "1,234.5679", "undefined", "infinite", "0.5",
    ]  # fmt: skip


def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("Title", ("name", "score"), [("[red]x[/red]", 1), ("[/]\x1b[2J", 2)], numbers=("score",))
    show_text("a\x9bb")
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out and "[/]\\x1b[2J" in out and "a\\x9bb" in out and "\x1b[2J" not in out


END = """\
runs/a/adapter
┌────────────────────┬─────────────────────────────────┐
│ trained parameters │ 1,234,567                       │
│ steps              │ 12,000 (best: step 9,000)       │
│ time               │ 1:01:40 h, 0.3 tokens/s         │
│ eval loss          │ 1.2500                          │
└────────────────────┴─────────────────────────────────┘
"""


def test_the_end_of_a_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.cli.train import _show

    monkeypatch.setenv("COLUMNS", "80")
    result: Any = SimpleNamespace(
        adapter="runs/a/adapter", trainable=1234567, steps=12_000, best_step=9_000, seconds=3700.0,
        tokens_per_second=0.31, metrics={"eval_loss": 1.25},
    )  # fmt: skip
    _show(result)

    def words(text: str) -> list[list[str]]:
        return [line.split() for line in text.splitlines() if "─" not in line]

    assert words(capsys.readouterr().out) == words(END)
    result.steps = 0
    _show(result)
    assert "fitted, nothing of the base is trained" in capsys.readouterr().out
