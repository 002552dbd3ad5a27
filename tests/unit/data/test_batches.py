"""Padding never changes what is scored; digests tell data sets apart."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.core.errors import ConfigError
from inlay.data import IGNORED, collate, encode, fingerprint, read_table, resolve_columns

ids = st.lists(st.integers(3, 99), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(ids, ids), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    task=st.sampled_from(["causal", "seq2seq"]),
    multiple=st.sampled_from([1, 8]),
)
def test_padding_adds_nothing_to_learn(byte_level, rows, side, task, multiple):
    tokenizer = copy.copy(byte_level)
    tokenizer.padding_side = side
    encoded = [
        {
            "input_ids": a,
            "attention_mask": [1] * len(a),
            "labels": [IGNORED, *a[1:]] if task == "causal" else b,
        }
        for a, b in rows
    ]
    batch = collate(tokenizer, task, multiple_of=multiple)(encoded)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["input_ids"].shape[1] % multiple == 0
    assert batch["input_ids"].shape[1] < max(len(a) for a, _ in rows) + multiple
    for place, row in enumerate(encoded):
        kept = batch["attention_mask"][place].bool()
        assert batch["input_ids"][place][kept].tolist() == row["input_ids"]
        assert (batch["input_ids"][place][~kept] == tokenizer.pad_token_id).all()
        labels = batch["labels"][place]
        assert labels[labels != IGNORED].tolist() == [label for label in row["labels"] if label != IGNORED]
        if task == "causal":
            assert labels[kept].tolist() == row["labels"]
        assert bool(kept[0 if side == "right" else -1])


def test_labels_of_classifiers_and_regressors(word_piece):
    rows = [{"input_ids": [1], "attention_mask": [1], "token_type_ids": [0], "labels": label} for label in (1, 0)]
    batch = collate(word_piece, "classification")(rows)
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [1, 0]
    assert "token_type_ids" in batch
    assert collate(word_piece, "regression")(rows)["labels"].dtype == torch.float32


def test_without_padding_token(sentence_piece):
    assert collate(sentence_piece, "causal").pad_id == sentence_piece.eos_token_id
    with pytest.raises(ConfigError, match="no padding token"):
        collate(sentence_piece, "classification")
    with pytest.raises(ConfigError, match="'causl' is unknown"):
        collate(sentence_piece, "causl")


def test_encoded_rows_feed_the_collator(write, byte_level):
    dataset = read_table(write("x.csv", "prompt,completion\na,b\nlonger,and longer\n"))
    rows = encode(dataset, resolve_columns(dataset), byte_level, task="causal", max_length=99)
    batch = collate(byte_level, "causal")([rows[0], rows[1]])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"] != IGNORED).any(dim=1).all()


class TestFingerprint:
    def test_counts_values_and_order_only(self, write):
        one = read_table(write("x.csv", "a,b\n1,2\n3,4\n5,6\n"))
        two = read_table(write("y.jsonl", '{"b": "2", "a": "1"}\n{"a": "3", "b": "4"}\n{"a": "5", "b": "6"}'))
        assert fingerprint(one) == fingerprint(two)
        assert fingerprint(one.select([2, 1, 0]).select([2, 1, 0])) == fingerprint(one)
        halves = concatenate_datasets([one.select([0]), one.select([1, 2])])
        assert fingerprint(halves) == fingerprint(one)
        assert len(fingerprint(one)) == 64

    @pytest.mark.parametrize(
        "changed",
        [
            {"a": [[1, 2], [4]], "b": ["x", "y"]},
            {"a": [[1], [2, 3]], "b": ["x", "y"]},
            {"a": [[1, 2], [3]], "b": ["y", "x"]},
            {"a": [[1, 2], [3]], "c": ["x", "y"]},
            {"a": [[1, 2], [3]]},
            {"a": [[1, 2], None], "b": ["x", "y"]},
            {"a": [[3], [1, 2]], "b": ["y", "x"]},
        ],
    )
    def test_tells_changes(self, changed):
        same = {"a": [[1, 2], [3]], "b": ["x", "y"]}
        assert fingerprint(Dataset.from_dict(same)) == fingerprint(Dataset.from_dict(same))
        assert fingerprint(Dataset.from_dict(changed)) != fingerprint(Dataset.from_dict(same))

    @settings(deadline=None, max_examples=40)
    @given(rows=st.lists(ids, min_size=1, max_size=8), data=st.data())
    def test_does_not_depend_on_chunks(self, rows, data):
        features = Features(x=List(Value("int32")))
        whole = Dataset.from_dict({"x": rows}, features=features)
        cut = data.draw(st.integers(0, len(rows)))
        parts = [Dataset.from_dict({"x": part}, features=features) for part in (rows[:cut], rows[cut:])]
        assert fingerprint(concatenate_datasets(parts)) == fingerprint(whole)
