"""Chats: only what the assistant says is scored, with and without generation blocks."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.core.errors import ConfigError, DataError
from inlay.data import IGNORED, Layout, encode, prompts, read_table

from .conftest import MARKED, REWRITING, UNMARKED

LAYOUT = Layout(kind="chat", messages="messages")


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def rows_of(*chats):
    return Dataset.from_list([{"messages": some} for some in chats])


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


said = st.text(alphabet="aeiou Tth.:\n\té€", min_size=1, max_size=12)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), said), min_size=1, max_size=6)


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
@settings(deadline=None, max_examples=60)
@given(turns=turns)
def test_scored_is_what_the_assistant_says(byte_level, template, turns):
    tokenizer, messages = with_template(byte_level, template), chat(*turns)
    answers = [content + "<end>" for role, content in turns if role == "assistant"]
    if not answers:
        with pytest.raises(DataError, match="no assistant message"):
            encode(rows_of(messages), LAYOUT, tokenizer, task="causal", max_length=999)
        return
    row = encode(rows_of(messages), LAYOUT, tokenizer, task="causal", max_length=999)[0]
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "".join(answers)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    # generation starts from exactly the tokens that stood before the last answer in training
    prompt = prompts(rows_of(messages), LAYOUT, tokenizer, task="causal")[0]
    last = max(place for place, turn in enumerate(turns) if turn[0] == "assistant")
    assert row["input_ids"][: len(prompt.input_ids)] == prompt.input_ids
    assert row["labels"][len(prompt.input_ids)] != IGNORED
    assert prompt.reference == turns[last][1]
    if last:
        expected = tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True)
        assert prompt.text == expected


def test_a_template_that_rewrites_earlier_turns_is_refused(byte_level, write):
    tokenizer = with_template(byte_level, REWRITING)
    one = chat(("user", "a"), ("assistant", "b"))
    row = encode(rows_of(one), LAYOUT, tokenizer, task="causal", max_length=99)[0]
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "b<end>"
    with pytest.raises(DataError, match=r"row 2: the chat template writes message 2 differently.*generation"):
        encode(rows_of(one, one + one), LAYOUT, tokenizer, task="causal", max_length=99)


def test_what_a_template_raises_names_the_row(byte_level):
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + MARKED
    tokenizer = with_template(byte_level, template)
    good, bad = chat(("user", "a"), ("assistant", "b")), chat(("assistant", "b"))
    with pytest.raises(DataError, match=r"row 2: the chat template does not accept this chat: user first"):
        encode(rows_of(good, bad), LAYOUT, tokenizer, task="causal", max_length=99)


def test_no_template(sentence_piece):
    with pytest.raises(ConfigError, match="no chat template"):
        encode(rows_of(chat(("assistant", "b"))), LAYOUT, sentence_piece, task="causal", max_length=99)


def test_messages_of_wrong_form_are_listed_together(write, byte_level):
    lines = [
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "x": null}]}',
        '{"messages": "hello"}',
        '{"messages": []}',
        '{"messages": [{"from": "human", "value": "a"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": [{"content": "a"}]}',
        '{"messages": ["a"]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
    ]
    dataset = read_table(write("x.jsonl", "\n".join(lines)))
    with pytest.raises(DataError) as caught:
        encode(dataset, LAYOUT, byte_level, task="causal", max_length=99)
    message = str(caught.value)
    for words in (
        "7 problems",
        "row 2 (line 2): 'messages' is text",
        "row 3 (line 3): 'messages' has no messages",
        "row 4 (line 4): 'messages' is in ShareGPT form",
        "message 1 whose content is a number (5)",
        "message 1 whose role is null or missing",
        "has text as message 1",
        "nothing can be learnt from it",
        '"role": "user"',
    ):
        assert words in message
