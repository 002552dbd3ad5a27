"""The label vocabulary, labels never seen, and numbers to predict."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.core.errors import DataError
from inlay.data import Layout, encode, labels_of, read_table, resolve_columns

LAYOUT = Layout(kind="classification", text="text", label="label")
NUMBERS = Layout(kind="regression", text="text", label="label")


def table(labels, features=None):
    return Dataset.from_dict({"text": ["the fox"] * len(labels), "label": labels}, features=features)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["spam", "ham", "spam"], ["ham", "spam"]),
        ([10, 9, -1], ["-1", "9", "10"]),
        (["10", "9", "09"], ["09", "9", "10"]),
        ([True, False], ["false", "true"]),
    ],
)
def test_vocabulary(labels, names):
    assert labels_of(table(labels), LAYOUT) == names


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(alphabet="ab1 2", min_size=1, max_size=3).filter(str.strip), min_size=2), st.randoms())
def test_vocabulary_does_not_depend_on_the_order(labels, random):
    shuffled = random.sample(labels, len(labels))
    results = []
    for some in (labels, shuffled):
        try:
            results.append(labels_of(table(some), LAYOUT))
        except DataError:
            results.append(None)
    assert results[0] == results[1]


def test_class_labels_keep_their_order(word_piece):
    features = Features(text=Value("string"), label=ClassLabel(names=["yes", "no", "maybe"]))
    dataset = table([1, 0], features)
    assert labels_of(dataset, LAYOUT) == ["yes", "no", "maybe"]
    encoded = encode(dataset, LAYOUT, word_piece, task="classification", max_length=9, label_names=["no", "yes"])
    assert encoded["labels"][:] == [0, 1]
    with pytest.raises(DataError, match=r"row 2: label -1 is not a class"):
        labels_of(table([1, -1], features), LAYOUT)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a", None, " "], ["row 2: 'label' is null", "row 3: 'label' is text", "Give the row a label"]),
        ([0.5, 1.0], ["a number (0.5)", "task regression"]),
        (["a", "a "], ["differs from 'a' only in white space"]),
        (["a", "a"], ["all rows have the label 'a'", "at least two"]),
    ],
)
def test_labels_that_cannot_be_used(labels, words):
    with pytest.raises(DataError) as caught:
        labels_of(table(labels), LAYOUT)
    for word in words:
        assert word in str(caught.value)


def test_labels_of_mixed_type(write):
    dataset = read_table(write("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}'))
    with pytest.raises(DataError, match=r"text in .*row 2 \(line 2\) and numbers in .*row 1"):
        labels_of(dataset, LAYOUT)


def test_a_label_never_seen_names_file_row_and_label(write, word_piece):
    train = read_table(write("train.csv", "text,label\na,spam\nb,ham\n"))
    names = labels_of(train, resolve_columns(train))
    test = read_table(write("test.csv", "text,label\na,spam\nb,spamm\nc,eggs\n"))
    with pytest.raises(DataError) as caught:
        encode(test, LAYOUT, word_piece, task="classification", max_length=9, label_names=names)
    message = str(caught.value)
    assert "test.csv, row 2 (line 3): label 'spamm' was never seen in training; did you mean 'spam'?" in message
    assert "test.csv, row 3 (line 4): label 'eggs'" in message
    assert "Known labels: ham, spam" in message


def test_numbers(word_piece):
    encoded = encode(table(["1.5", "-2"]), NUMBERS, word_piece, task="regression", max_length=9)
    assert encoded["labels"][:] == [1.5, -2.0]
    with pytest.raises(DataError) as caught:
        encode(table(["1,5", "nan", "", "inf"]), NUMBERS, word_piece, task="regression", max_length=9)
    for words in (
        "row 1: 'label' is '1,5'",
        "row 2",
        "row 3: 'label' is empty text",
        "row 4",
        "with a point",
    ):
        assert words in str(caught.value)
