"""What is scored is exactly what should be learnt, whatever the tokenizer and the text."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.core.errors import ConfigError, DataError
from inlay.data import IGNORED, Layout, Template, encode, encode_prompt, prompts, read_table, resolve_columns

PAIRS = Layout(kind="completion", prompt="prompt", completion="completion")
TEXT = Layout(kind="text", text="text")
texts = st.text(alphabet="aeiou Tth.:\n\té€😀", max_size=20)
filled = texts.filter(str.strip)
separators = st.sampled_from(["\n", " ", ": ", "", "\n\n", " -> "])


def pairs(*rows):
    return Dataset.from_dict({"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]})


def scored(row):
    return [label for label in row["labels"] if label != IGNORED]


@settings(deadline=None, max_examples=80)
@given(prompt=texts, completion=filled, separator=separators)
def test_byte_level_scores_exactly_the_completion(byte_level, prompt, completion, separator):
    template, dataset = Template(separator=separator), pairs((prompt, completion))
    if not prompt + separator:
        with pytest.raises(DataError, match="there is nothing before the completion"):
            encode(dataset, PAIRS, byte_level, task="causal", max_length=999, template=template)
        return
    row = encode(dataset, PAIRS, byte_level, task="causal", max_length=999, template=template)[0]
    before = prompts(dataset, PAIRS, byte_level, task="causal", template=template)[0]
    assert byte_level.decode(scored(row)) == completion + "<end>"
    assert scored(row)[-1] == byte_level.eos_token_id and scored(row).count(byte_level.eos_token_id) == 1
    assert byte_level.decode(row["input_ids"]) == prompt + separator + completion + "<end>"
    # generation starts from exactly the tokens that stood before the scored ones in training
    assert before.input_ids == row["input_ids"][: -len(scored(row))]
    assert before.text == prompt + separator and before.reference == completion
    assert row["labels"] == [IGNORED] * len(before.input_ids) + row["input_ids"][len(before.input_ids) :]
    assert encode_prompt(prompt, byte_level, task="causal", template=template) == before.input_ids
    assert row["attention_mask"] == [1] * len(row["input_ids"])


@settings(deadline=None, max_examples=80)
@given(prompt=texts, completion=filled, separator=separators)
def test_sentence_piece_inserts_no_space(sentence_piece, prompt, completion, separator):
    template, dataset = Template(separator=separator), pairs((prompt, completion))
    row = encode(dataset, PAIRS, sentence_piece, task="causal", max_length=999, template=template)[0]
    before = prompts(dataset, PAIRS, sentence_piece, task="causal", template=template)[0]
    assert row["input_ids"][0] == sentence_piece.bos_token_id == before.input_ids[0]
    assert before.input_ids == row["input_ids"][: -len(scored(row))]
    assert sentence_piece.decode(row["input_ids"][1:-1]) == prompt + separator + completion
    assert scored(row)[-1] == sentence_piece.eos_token_id


def test_an_end_token_already_there_is_not_doubled(byte_level):
    rows = encode(pairs(("a", "b<end>")), PAIRS, byte_level, task="causal", max_length=9)
    assert byte_level.decode(scored(rows[0])) == "b<end>"
    rows = encode(pairs(("a", "b")), PAIRS, byte_level, task="causal", max_length=9, template=Template(end=False))
    assert byte_level.decode(scored(rows[0])) == "b"


def test_templates_may_name_other_columns(byte_level):
    dataset = Dataset.from_dict({"prompt": ["Who?"], "context": ["The fox."], "completion": ["fox"]})
    template = Template(prompt="{context}\nQ: {prompt}", separator=" A: ")
    assert prompts(dataset, PAIRS, byte_level, task="causal", template=template)[0].text == "The fox.\nQ: Who? A: "
    with pytest.raises(DataError, match=r"\{contxt\} is not a column; did you mean 'context'"):
        encode(dataset, PAIRS, byte_level, task="causal", max_length=99, template=Template(prompt="{contxt}"))


class TestLong:
    @settings(deadline=None, max_examples=60)
    @given(prompt=texts, completion=filled, max_length=st.integers(2, 12))
    def test_truncation_keeps_the_completion_first(self, byte_level, prompt, completion, max_length):
        dataset = pairs((prompt, completion))
        whole = encode(dataset, PAIRS, byte_level, task="causal", max_length=999)[0]
        row = encode(dataset, PAIRS, byte_level, task="causal", max_length=max_length, on_long="truncate")[0]
        kept = scored(row)
        assert len(row["input_ids"]) == min(max_length, len(whole["input_ids"])) == len(row["labels"])
        assert kept == scored(whole)[: max_length - 1]
        before = whole["input_ids"][: -len(scored(whole))]
        assert before[len(before) - (len(row["labels"]) - len(kept)) :] == row["input_ids"][: -len(kept)]

    def test_error_lists_the_rows_and_the_remedy(self, write, byte_level):
        path = write("x.csv", "prompt,completion\na,b\n" + f"{'q ' * 30},b\n" * 12)
        dataset = read_table(path)
        with pytest.raises(DataError) as caught:
            encode(dataset, PAIRS, byte_level, task="causal", max_length=20)
        message = str(caught.value)
        assert "12 problems" in message and f"{path}, row 2 (line 3) has " in message
        assert "Of 13 rows 12 are too long; the longest has " in message
        assert "more than 20" in message and "and 2 more" in message and "on_long" in message

    def test_drop_logs_how_many(self, byte_level, caplog):
        dataset = pairs(("a", "b"), ("a" * 99, "b"))
        with caplog.at_level(logging.INFO, "inlay.data"):
            assert len(encode(dataset, PAIRS, byte_level, task="causal", max_length=20, on_long="drop")) == 1
        assert "1 of 2 rows are longer than 20 tokens: drop" in caplog.text
        with pytest.raises(DataError, match="all 1 rows are longer than 20"):
            encode(dataset.select([1]), PAIRS, byte_level, task="causal", max_length=20, on_long="drop")

    @settings(deadline=None, max_examples=60)
    @given(text=filled, max_length=st.integers(2, 9), lead=st.booleans())
    def test_split_scores_every_token_once(self, byte_level, sentence_piece, text, max_length, lead):
        tokenizer = sentence_piece if lead else byte_level
        dataset = Dataset.from_dict({"text": [text]})
        rows = encode(dataset, TEXT, tokenizer, task="causal", max_length=max_length, on_long="split")
        whole = encode(dataset, TEXT, tokenizer, task="causal", max_length=999)[0]
        assert max(map(len, rows["input_ids"])) <= max_length
        assert [label for row in rows for label in scored(row)] == whole["input_ids"][1:]
        assert whole["labels"] == [IGNORED, *whole["input_ids"][1:]]


def test_a_chat_masked_away_entirely_is_an_error(byte_level):
    chat = [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"row 1: no token is left to score. Raise max_length"):
        encode(
            Dataset.from_dict({"messages": [chat]}),
            Layout(kind="chat", messages="messages"),
            byte_level,
            task="causal",
            max_length=10,
            on_long="truncate",
        )


def test_wrong_rows_are_listed_together(write, byte_level):
    lines = ['{"prompt": "a", "completion": "b"}', '{"prompt": 3, "completion": "b"}', '{"prompt": "a"}', "",
             '{"prompt": ["a"], "completion": " "}']  # fmt: skip
    path = write("x.jsonl", "\n".join(lines))
    dataset = read_table(path)
    with pytest.raises(DataError) as caught:
        encode(dataset, resolve_columns(dataset), byte_level, task="causal", max_length=99)
    message = str(caught.value)
    for words in (
        "4 problems",
        f"{path}, row 2 (line 2): 'prompt' is a number (3), expected text",
        f"{path}, row 3 (line 3): 'completion' is null or missing",
        f"{path}, row 4 (line 5): 'prompt' is a list",
        "row 4 (line 5): 'completion' is only white space",
        "Write every value of this column as text",
        "Fill in the text",
    ):
        assert words in message


def test_unused_columns_may_hold_anything(write, byte_level):
    path = write("x.jsonl", '{"text": "a", "meta": 1}\n{"text": "b", "meta": {"x": [1]}}\n{"text": "c"}')
    dataset = read_table(path)
    assert len(encode(dataset, resolve_columns(dataset), byte_level, task="causal", max_length=9)) == 3


class TestPaired:
    def test_seq2seq(self, word_piece, sentence_piece):
        row = encode(pairs(("the fox", "the dog")), PAIRS, sentence_piece, task="seq2seq", max_length=99)[0]
        assert row["input_ids"] == sentence_piece("the fox")["input_ids"]
        assert row["labels"] == [*sentence_piece("the dog")["input_ids"], sentence_piece.eos_token_id]
        given = prompts(pairs(("the fox", "the dog")), PAIRS, sentence_piece, task="seq2seq")[0]
        assert given == ("the fox", row["input_ids"], "the dog")
        with pytest.raises(DataError, match="more than 4"):
            encode(pairs(("fox", "the dog " * 9)), PAIRS, sentence_piece, task="seq2seq", max_length=4)
        short = encode(
            pairs(("fox " * 9, "the dog " * 9)),
            PAIRS,
            word_piece,
            task="seq2seq",
            max_length=5,
            on_long="truncate",
        )[0]
        assert len(short["input_ids"]) == len(short["labels"]) == 5
        assert short["input_ids"][-1] == word_piece.sep_token_id

    def test_classification_of_pairs(self, word_piece):
        dataset = Dataset.from_dict({"s": ["the fox", "the"], "t": ["dog", "fox"], "label": ["y", "n"]})
        layout = resolve_columns(dataset, {"text": "s", "pair": "t"})
        rows = encode(dataset, layout, word_piece, task="classification", max_length=16)
        expected = word_piece("the fox", "dog")
        assert rows[0]["input_ids"] == expected["input_ids"]
        assert rows[0]["token_type_ids"] == expected["token_type_ids"]
        assert rows["labels"][:] == [1, 0]
        assert str(rows.features["labels"].dtype) == "int64"
        with pytest.raises(DataError, match="row 1 has"):
            encode(dataset, layout, word_piece, task="classification", max_length=4)

    def test_a_decoder_answers_with_the_label(self, byte_level):
        dataset = Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]})
        layout = resolve_columns(dataset, task="causal")
        rows = encode(dataset, layout, byte_level, task="causal", max_length=16)
        assert [byte_level.decode(scored(row)) for row in rows] == ["1<end>", "0<end>"]


def test_options_that_do_not_exist_or_fit(byte_level):
    dataset = pairs(("a", "b"))
    for options, words in [
        ({"task": "classification"}, "completion data is for causal or seq2seq"),
        ({"on_long": "cut"}, "on_long='cut'"),
        ({"on_long": "split"}, "for plain text"),
        ({"max_length": 1}, "max_length=1"),
    ]:
        with pytest.raises(ConfigError, match=words):
            encode(dataset, PAIRS, byte_level, **({"task": "causal", "max_length": 9} | options))


def test_a_tokenizer_without_end_token(word_piece):
    with pytest.raises(ConfigError, match="no end token"):
        encode(pairs(("a", "b")), PAIRS, word_piece, task="causal", max_length=9)
    rows = encode(pairs(("fox", "dog")), PAIRS, word_piece, task="causal", max_length=9, template=Template(end=False))
    assert word_piece.decode(scored(rows[0])) == "dog"
