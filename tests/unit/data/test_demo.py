from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from inlay.core.errors import OutputError
from inlay.data import demo


def facts_of(prompt: str) -> tuple[str, dict[str, str]]:
    kind, *fields = prompt.split("; ")
    return kind, dict(field.split(": ") for field in fields)


def test_sizes_and_shape() -> None:
    splits = demo.records()
    assert {name: len(rows) for name, rows in splits.items()} == {"test": 200, "valid": 100, "train": 2000}
    for row in splits["train"]:
        assert set(row) == {"prompt", "completion"}
        assert row["completion"].endswith(".") and "\n" not in row["prompt"]
        # Far below 120 tokens: no tokenizer with the alphabet in it needs more tokens than characters.
        assert len(row["prompt"]) < 150 and len(row["completion"]) < 120


def test_the_seed_decides() -> None:
    assert demo.records(20, 5, 5, seed=3) == demo.records(20, 5, 5, seed=3) != demo.records(20, 5, 5, seed=4)


def test_no_sentence_is_told_twice() -> None:
    told = [row["completion"] for rows in demo.records().values() for row in rows]
    assert len(set(told)) == len(told)


def test_every_kind_is_as_common() -> None:
    for rows in demo.records().values():
        kinds = [facts_of(row["prompt"])[0] for row in rows]
        assert {kind: kinds.count(kind) for kind in demo.KINDS} == dict.fromkeys(demo.KINDS, len(rows) // 5)


def test_fields_come_in_many_orders_and_one_is_never_told() -> None:
    rows = [row for row in demo.records()["train"] if row["prompt"].startswith("weather")]
    orders = {tuple(facts_of(row["prompt"])[1]) for row in rows}
    assert len(orders) > 60
    assert not any(facts_of(row["prompt"])[1]["no"] in row["completion"] for row in rows)


@pytest.mark.parametrize(
    ("kind", "fragments"),
    [
        # Number agreement of verb and noun, means of travel, and a list of three.
        (
            "journey",
            {" walks from", " walk from", " takes the", " take the", " one hour.", " two hours.", ", "},
        ),
        ("shop", {" has no ", " sells one ", " for one shilling", " shillings each."}),
        ("supper", {" for herself ", " for himself ", " one guest ", " two guests "}),
        ("weather", {" all ", " but at night "}),
        ("race", {" wins the race before ", " and "}),
    ],
)
def test_every_rule_occurs_in_training_and_test(kind: str, fragments: set[str]) -> None:
    splits = demo.records()
    for split in ("train", "test"):
        told = " ".join(row["completion"] for row in splits[split] if row["prompt"].startswith(kind))
        assert {f for f in fragments if f not in told} == set()


def test_what_is_worked_out_is_right() -> None:
    for row in demo.records()["train"]:
        kind, facts = facts_of(row["prompt"])
        if kind == "race":
            first, second, third = (part[2:] for part in sorted(facts["results"].split(", ")))
            assert row["completion"].endswith(f" {first} wins the race before {second} and {third}.")
        if kind == "weather":
            assert (facts["morning"] == facts["night"]) == (" all " in row["completion"])


def test_words_by_hand() -> None:
    assert [demo.joined(list(words)) for words in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
    assert [demo.counted(n, "loaf", "loaves") for n in (0, 1, 2)] == ["no loaves", "one loaf", "two loaves"]
    assert len(demo.NUMBERS) == 13 and not set(demo.WOMEN) & set(demo.MEN)
    facts, sentence = demo.race(random.Random(1))
    assert set(facts) == {"place", "results"} and sentence.startswith(f"In {facts['place']} ")


def test_files_are_written_whole(tmp_path: Path) -> None:
    splits = demo.records(6, 2, 2)
    paths = demo.write_records(tmp_path / "new", splits)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "test.jsonl",
        "train.jsonl",
        "valid.jsonl",
    ]
    for split, path in paths.items():
        assert [json.loads(line) for line in path.read_text().splitlines()] == splits[split]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another folder"):
        demo.write_records(tmp_path / "file", splits)
