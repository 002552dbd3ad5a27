"""Columns by name and by mapping, and what is said when they cannot be found."""

from __future__ import annotations

import subprocess
import sys

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from inlay.core.errors import ConfigError, DataError
from inlay.data import Layout, Template, parse_columns, resolve_columns


def table(**columns):
    return Dataset.from_dict(
        {name: values if isinstance(values, list) else [values] for name, values in columns.items()}
    )


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("columns", "given", "task", "expected"),
    [
        (
            {"prompt": "a", "completion": "b"},
            None,
            None,
            Layout(kind="completion", prompt="prompt", completion="completion"),
        ),
        ({"messages": [CHAT], "id": 1}, None, None, Layout(kind="chat", messages="messages")),
        ({"text": "a", "label": 1}, None, None, Layout(kind="classification", text="text", label="label")),
        (
            {"text": "a", "label": "x", "pair": "b"},
            None,
            None,
            Layout(kind="classification", text="text", label="label", pair="pair"),
        ),
        (
            {"text": ["a", "b"], "label": ["1.5", "2"]},
            None,
            None,
            Layout(kind="regression", text="text", label="label"),
        ),
        (
            {"text": ["a", "b"], "label": ["1", "2"]},
            None,
            None,
            Layout(kind="classification", text="text", label="label"),
        ),
        (
            {"text": ["a", "b"], "label": [1, 2]},
            None,
            "regression",
            Layout(kind="regression", text="text", label="label"),
        ),
        ({"text": "a", "id": 1}, None, None, Layout(kind="text", text="text")),
        (
            {"text": "a", "label": "b"},
            None,
            "causal",
            Layout(kind="classification", text="text", label="label"),
        ),
        ({"text": "a", "label": "b"}, {"text": "text"}, "causal", Layout(kind="text", text="text")),
        (
            {"text": "a", "prompt": "b", "completion": "c"},
            None,
            "seq2seq",
            Layout(kind="completion", prompt="prompt", completion="completion"),
        ),
        (
            {"text": "a", "prompt": "b", "completion": "c"},
            {"text": "text"},
            "causal",
            Layout(kind="text", text="text"),
        ),
        (
            {"mr": "a", "ref": "b"},
            {"prompt": "mr", "completion": "ref"},
            None,
            Layout(kind="completion", prompt="mr", completion="ref"),
        ),
        (
            {"prompt": "a", "ref": "b"},
            {"completion": "ref"},
            None,
            Layout(kind="completion", prompt="prompt", completion="ref"),
        ),
        (
            {"s1": "a", "s2": "b", "label": 1},
            {"text": "s1", "pair": "s2"},
            None,
            Layout(kind="classification", text="s1", pair="s2", label="label"),
        ),
    ],
)
def test_layouts(columns, given, task, expected):
    assert resolve_columns(table(**columns), given, task=task) == expected


@pytest.mark.parametrize(
    ("columns", "given", "task", "words"),
    [
        (
            {"prompt": "a", "competion": "b"},
            None,
            None,
            ["no column 'completion'; did you mean 'competion'?", "columns are: prompt, competion"],
        ),
        (
            {"question": "a", "answer": "b"},
            None,
            None,
            ["no known columns", "columns are: question, answer", "prompt=question,completion=answer"],
        ),
        (
            {"mr": "a", "ref": "b"},
            {"prompt": "mrs", "completion": "x"},
            None,
            ["2 problems", "prompt=mrs", "did you mean 'mr'", "completion=x"],
        ),
        ({"mr": "a", "ref": "b"}, {"promt": "mr"}, None, ["unknown role 'promt'", "did you mean 'prompt'"]),
        ({"mr": "a", "ref": "b"}, {"prompt": "mr"}, None, ["no column 'completion'"]),
        ({"mr": "a", "ref": "b"}, {"prompt": "mr", "text": "ref"}, None, ["do not go together"]),
        (
            {"mr": "a", "ref": "b"},
            {"prompt": "mr", "completion": "mr"},
            None,
            ["'mr' is given for prompt and completion"],
        ),
        (
            {"text": "a", "prompt": "b", "completion": "c"},
            None,
            None,
            ["several ways", "prompt and completion; text", "columns="],
        ),
        (
            {"prompt": "a", "completion": "b"},
            None,
            "classification",
            ["not for the task 'classification'", "causal or seq2seq"],
        ),
        ({"messages": [CHAT]}, None, "seq2seq", ["chat data", "but for causal"]),
        ({"text": "a"}, None, "clasification", ["did you mean 'classification'"]),
    ],
)
def test_refusals(columns, given, task, words):
    with pytest.raises(DataError) as caught:
        resolve_columns(table(**columns), given, task=task)
    for word in words:
        assert word in str(caught.value)


def test_class_labels_are_never_numbers_to_predict():
    features = Features(text=Value("string"), label=ClassLabel(names=["a", "b"]))
    assert resolve_columns(Dataset.from_dict({"text": ["x"], "label": [0]}, features=features)).kind == "classification"


def test_parse_columns():
    assert parse_columns("prompt=mr, completion = ref") == {"prompt": "mr", "completion": "ref"}
    with pytest.raises(DataError) as caught:
        parse_columns("prompt,promt=x,text=a,text=b,label=")
    for words in ("4 problems", "'prompt' is not", "'promt'", "text is given twice", "'label='"):
        assert words in str(caught.value)


def test_a_role_that_is_not_there():
    with pytest.raises(DataError, match="text data has no label column"):
        Layout(kind="text", text="text").column("label")


def test_template_options():
    with pytest.raises(ConfigError, match=r"\{\} is not a column's name"):
        Template(prompt="{}")
    with pytest.raises(ConfigError, match=r"write \{\{ and"):
        Template(prompt="{a")
    with pytest.raises(ConfigError, match=r"\{a\[0\]\} is not a column's name"):
        Template(prompt="{a[0]}")
    for meant_for_numbers in ("{a:d}", "{a!x}"):
        with pytest.raises(ConfigError, match=r"write \{\{ and"):
            Template(prompt=meant_for_numbers)
    with pytest.raises(DataError, match=r"\{promt\} is not a column; did you mean 'prompt'"):
        Template(prompt="{promt}").check(["prompt", "id"])
    # a value that looks like a template stays as it is
    assert Template(prompt="{{Q}}: {prompt}").render({"prompt": "{x}"}) == "{Q}: {x}"


def test_options_need_neither_torch_nor_datasets():
    code = (
        "import sys; from inlay.data import Layout, Reading, Template, parse_columns, resolve_columns; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
