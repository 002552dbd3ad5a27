"""Every file that cannot be used ends in one message with file, place and remedy."""

from __future__ import annotations

import gzip

import pytest

from inlay.core.errors import DataError
from inlay.data import Reading, read_table

# name, content, words that the message must have
CASES = {
    "unknown type": ("x.xlsx", "PK", ["unknown file type '.xlsx'", ".jsonl", "format="]),
    "no suffix": ("data", "a\n", ["unknown file type '(no suffix)'"]),
    "empty": ("x.jsonl", "", ["is empty", "at least one row"]),
    "only blanks": ("x.csv", "\n \n", ["is empty"]),
    "only a header": ("x.csv", "prompt,completion\n", ["is empty", "no rows"]),
    "empty list": ("x.json", "[]", ["is empty"]),
    "duplicate header": ("x.csv", "a,b,a\n1,2,3\n", ["columns 1, 3", "'a'", "own name"]),
    "ragged": (
        "x.csv",
        "a,b\n1,2\n1\n1,2,3\n",
        ["row 2 (line 3) has 1 cell,", "row 3 (line 4) has 3 cells", "quotes"],
    ),
    "ragged tsv": ("x.tsv", 'a\tb\n"1\t2"\t3\n', ["row 1 (line 2) has 3 cells", "quoted=True"]),
    "wrong delimiter": ("x.csv", "a;b\n1;2\n", ["delimiter=';'"]),
    "open quote": ("x.csv", 'a,b\n1,"2\n3,4\n', ["from line 2", "close every quote"]),
    "stray quote": ("x.csv", 'a,b\n1,2\n"1"x,2\n', ["from line 3", "quoted=False"]),
    "malformed line": (
        "x.jsonl",
        '{"a": 1}\n{"a": \n{"a": 2}\n{a: 2}\n',
        ["line 2 is not", "line 4 is not", "2 problems"],
    ),
    "no object": ("x.jsonl", '{"a": 1}\n[1]\n"x"\n', ["line 2 is a list", "line 3 is text"]),
    "document as lines": ("x.jsonl", '[\n{"a": 1}\n]\n', ["name the file .json"]),
    "malformed document": ("x.json", '[{"a": 1},\n {"a" 2}]', ["line 2, column", "list of objects"]),
    "object as document": (
        "x.json",
        '{"data": [\n{"a": 1}]}',
        ["an object with the keys 'data'", "Write only the list"],
    ),
    "items": ("x.json", '[{"a": 1}, 5]', ["row 2 is a number (5)"]),
    "latin-1": ("x.csv", b"a\nok\ncaf\xe9\n", ["line 3, byte 4 is 0xe9", "encoding=latin-1"]),
    "utf-16": ("x.txt", "hello".encode("utf-16"), ["encoding=utf-16"]),
    "truncated gzip": ("x.csv.gz", gzip.compress(b"a\n1\n" * 99)[:-9], ["not a complete gzip file", "again"]),
    "no gzip": ("x.csv.gz", "a\n1\n", ["not a complete gzip file"]),
    "no parquet": ("x.parquet", "PAR1", ["not a complete Parquet file"]),
    "half a character": ("x.jsonl", '{"text": "\\ud800"}', ["column 'text'", "surrogate"]),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_file_place_and_remedy(write, case):
    name, content, expected = CASES[case]
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read_table(path)
    message = str(caught.value)
    for words in [str(path), *expected]:
        assert words in message


def test_long_lists_are_cut_and_counted(write):
    path = write("x.jsonl", "\n".join(["{"] * 25))
    with pytest.raises(DataError) as caught:
        read_table(path, reading=Reading(format="jsonl"))
    message = str(caught.value)
    assert "25 problems" in message and "and 15 more" in message
    assert "line 10 " in message and "line 11 " not in message


def test_missing_files(tmp_path, write):
    write("tickets.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file. Did you mean .*tickets\.jsonl\?"):
        read_table(tmp_path / "ticket.jsonl")
    with pytest.raises(DataError, match=r"contains tickets\.jsonl"):
        read_table(tmp_path / "other.csv")
    with pytest.raises(DataError, match="does not exist"):
        read_table(tmp_path / "no" / "other.csv")
    with pytest.raises(DataError, match="no such file"):
        read_table("surely-not-here.csv")  # text that looks like a file is never looked up on the hub


def test_folders_and_splits(tmp_path, write):
    path = write("x.csv", "a\n1\n")
    with pytest.raises(DataError, match=r"is a folder, expected a file. It contains x\.csv"):
        read_table(tmp_path)
    with pytest.raises(DataError, match="a local file has no split 'test'"):
        read_table(path, split="test")
