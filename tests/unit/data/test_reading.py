"""Files to rows: every format, and that values arrive as they were written."""

from __future__ import annotations

import csv
import gzip
import io
import json
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.core.errors import ConfigError, DataError
from inlay.data import ORIGIN, Reading, origins, read_table
from inlay.data.delimited import parse_delimited
from inlay.data.jsonrows import parse_json, parse_jsonl
from inlay.data.parsed import to_dataset

ROWS = [{"prompt": "a, b", "completion": 'say "c"'}, {"prompt": "NA", "completion": "007"}]


def plain(dataset):
    return [{key: value for key, value in row.items() if key != ORIGIN} for row in dataset]


FILES = {
    "x.csv": 'prompt,completion\n"a, b","say ""c"""\nNA,007\n',
    "x.tsv": 'prompt\tcompletion\r\na, b\tsay "c"\r\nNA\t007\r\n',
    "x.jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "x.ndjson": "\n".join(json.dumps(row) for row in ROWS),
    "x.json": json.dumps(ROWS, indent=2),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_text_format_gives_the_same_rows(write, name, packed):
    content = FILES[name].encode()
    path = write(name + ".gz" * packed, gzip.compress(content) if packed else content)
    assert plain(read_table(path)) == ROWS
    assert plain(read_table(str(path))) == ROWS


@pytest.mark.parametrize("packed", [False, True])
def test_parquet(write, packed):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(ROWS).append_column("kind", pa.array(["x", "y"]).dictionary_encode())
    pq.write_table(table, sink)
    content = sink.getvalue()
    dataset = read_table(write("x.parquet" + ".gz" * packed, gzip.compress(content) if packed else content))
    assert plain(dataset) == [row | {"kind": kind} for row, kind in zip(ROWS, "xy", strict=True)]
    assert origins(dataset)[1].split("x.parquet")[1] == ".gz" * packed + ", row 2"


@pytest.mark.parametrize(
    ("unit", "rows", "lines"),
    [
        ("line", ["one", " two", "three"], [1, 2, 5]),
        ("paragraph", ["one\n two", "three"], [1, 5]),
        ("document", ["one\r\n two\r\n\n\nthree"], [1]),
    ],
)
def test_plain_text(write, unit, rows, lines):
    path = write("x.txt", "one\r\n two\r\n\n\nthree")
    dataset = read_table(path, reading=Reading(unit=unit))
    assert dataset["text"][:] == rows
    assert [int(place.rsplit("line ")[1][:-1]) for place in origins(dataset)] == lines


def test_rows_know_their_lines_through_shuffles(write):
    path = write("x.csv", 'prompt,completion\n"two\nlines",a\n\nb,c\n')
    dataset = read_table(path)
    assert origins(dataset) == [f"{path}, row 1 (line 2)", f"{path}, row 2 (line 5)"]
    assert origins(dataset.select([1])) == [f"{path}, row 2 (line 5)"]
    assert origins(Dataset.from_list(ROWS)) == ["row 1", "row 2"]


def test_nothing_is_cached(write):
    assert read_table(write("x.csv", FILES["x.csv"])).cache_files == []


def test_other_delimiter_quotes_header_and_encoding(write):
    reading = Reading(delimiter=";", header=("label", "text"), encoding="latin-1", format="csv")
    dataset = read_table(write("x.data", "1;café\n0;thé\n".encode("latin-1")), reading=reading)
    assert plain(dataset) == [{"label": "1", "text": "café"}, {"label": "0", "text": "thé"}]
    quoted = read_table(write("x.tsv", 'a\tb\n"x\ty"\tz\n'), reading=Reading(quoted=True))
    assert plain(quoted) == [{"a": "x\ty", "b": "z"}]


def test_byte_order_mark_and_separators_inside_json(write):
    path = write("x.jsonl", '\ufeff{"text": "a\u2028b"}\n')
    assert plain(read_table(path)) == [{"text": "a\u2028b"}]
    assert plain(read_table(path, reading=Reading(encoding="UTF_8"))) == [{"text": "a\u2028b"}]


def test_long_cells_and_the_index_column_of_pandas(write):
    long = "x" * 200_000
    before = csv.field_size_limit()
    dataset = read_table(write("x.csv", f",text\n0,{long}\n"))
    assert plain(dataset) == [{"column_1": "0", "text": long}]
    assert csv.field_size_limit() == before


def test_mixed_and_nested_columns_come_back_as_they_were(write):
    rows = [
        {"x": 1, "m": [{"role": "user", "content": "5"}], "t": None},
        {"x": "1", "m": [{"role": "tool", "name": "n"}], "t": ["a"]},
        {"x": None, "m": [], "t": []},
    ]
    dataset = read_table(write("x.jsonl", "\n".join(map(json.dumps, rows))))
    assert plain(dataset) == rows


def test_a_saved_data_set_folder(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert plain(read_table(tmp_path / "one")) == ROWS
    both = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
    both.save_to_disk(str(tmp_path / "two"))
    assert len(read_table(tmp_path / "two")) == 2
    assert len(read_table(tmp_path / "two", split="test")) == 1
    with pytest.raises(DataError, match=r"no split 'dev'. It has: train, test"):
        read_table(tmp_path / "two", split="dev")


class TestHub:
    def test_reads_the_only_split_or_train(self, monkeypatch):
        asked = []

        def load(name, configuration, split):
            asked.append((name, configuration, split))
            one = Dataset.from_list(ROWS, features=Features(prompt=Value("string"), completion=Value("string")))
            return one if split else DatasetDict(train=one, test=one)

        monkeypatch.setattr("inlay.data.hub.load_dataset", load)
        dataset = read_table("owner/name:en")
        assert origins(dataset)[0] == "owner/name:en[train], row 1"
        assert origins(read_table("name", split="test[:2]"))[1] == "name[test[:2]], row 2"
        assert asked == [("owner/name", "en", None), ("name", None, "test[:2]")]

    def test_several_splits_without_train(self, monkeypatch):
        one = Dataset.from_list(ROWS)
        monkeypatch.setattr("inlay.data.hub.load_dataset", lambda *_, split: DatasetDict(a=one, b=one))
        with pytest.raises(DataError, match=r"none is named 'train'. Choose one with split=: a, b"):
            read_table("owner/name")

    @pytest.mark.parametrize(("offline", "words"), [(True, "offline mode is on"), (False, "gone fishing")])
    def test_failures_say_why(self, monkeypatch, offline, words):
        def fail(*_, split):
            raise ConnectionError("gone fishing\nlong trace")

        monkeypatch.setattr("inlay.data.hub.load_dataset", fail)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
        with pytest.raises(DataError, match=words):
            read_table("owner/name")


def test_reading_options_are_checked_together():
    with pytest.raises(ConfigError) as caught:
        Reading(format="exel", encoding="klingon", delimiter="ab", unit="lines")
    for words in ("format='exel'", "encoding='klingon'", "delimiter='ab'", "did you mean 'line'?"):
        assert words in str(caught.value)
    assert Reading(encoding="latin-1").to_dict() == {"encoding": "latin-1"}


cells = st.text(alphabet=string.ascii_letters + " ,;\"'\n\té€", max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_csv_round_trip(rows):
    sink = io.StringIO(newline="")
    csv.writer(sink).writerows([("a", "b"), *rows])
    parsed = parse_delimited(sink.getvalue(), "x.csv", delimiter=",", quoted=True, header=None)
    assert list(zip(parsed.columns["a"], parsed.columns["b"], strict=True)) == rows
    starts = sink.getvalue().split("\r\n") if not any("\n" in c for row in rows for c in row) else None
    if starts:
        assert list(parsed.lines) == list(range(2, len(rows) + 2))


scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=6)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v), max_leaves=6
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.fixed_dictionaries({"a": values, "b": scalars}), min_size=1, max_size=5))
def test_json_round_trip(rows):
    for parsed in (
        parse_jsonl("\n".join(json.dumps(row) for row in rows), "x"),
        parse_json(json.dumps(rows), "x"),
    ):
        assert plain(to_dataset(parsed, "x")) == rows


def test_class_labels_survive_parquet(write):
    features = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]))
    sink = io.BytesIO()
    Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).to_parquet(sink)
    assert read_table(write("x.parquet", sink.getvalue())).features["label"].names == ["no", "yes"]
