from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset

from inlay.core.errors import ConfigError, DataError
from inlay.data import prompts, resolve_columns
from inlay.evaluate import metrics
from inlay.evaluate.generate import generate_texts
from inlay.evaluate.likelihood import row_nats
from inlay.evaluate.run import DEFAULTS, Evaluation, Settings, evaluate

COMPLETIONS = Dataset.from_dict(
    {"prompt": ["w1 w2", "w3", "w1 w2"], "completion": ["w4 w5", "w6", "w7 w8 w9"]},
)
LABELLED = Dataset.from_dict({"text": ["w1 w2", "w3", "w4 w5 w6", "w7"], "label": ["w20", "w21", "w20", "w22"]})


def run(model: Any, tokenizer: Any, dataset: Dataset, task: Any = "causal", **rest: Any) -> Evaluation:
    return evaluate(model, tokenizer, dataset, resolve_columns(dataset, task=task), task, **rest)


def test_completions_are_scored_by_likelihood(causal: Any, tokenizer: Any) -> None:
    found = run(causal, tokenizer, COMPLETIONS)
    rows = [
        {"input_ids": [4, 5, 7, 8, 1], "labels": [-100, -100, 7, 8, 1]},
        {"input_ids": [6, 9, 1], "labels": [-100, 9, 1]},
        {"input_ids": [4, 5, 10, 11, 12, 1], "labels": [-100, -100, 10, 11, 12, 1]},
    ]
    loss = sum(row_nats(causal, tokenizer, rows)) / 9
    assert found["metrics"] == pytest.approx({"loss": loss, "perplexity": math.exp(loss)})
    assert (found["kind"], found["task"], found["rows"], found["predictions"]) == (
        "completion",
        "causal",
        3,
        [],
    )


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_rows_with_one_prompt_are_references_of_one_answer(
    kind: str, tokenizer: Any, one_causal: Any, one_seq2seq: Any
) -> None:
    model = {"causal": one_causal, "seq2seq": one_seq2seq}[kind]
    names = ["exact_match", "bleu", "rougeL"]
    found = run(model, tokenizer, COMPLETIONS, kind, metrics=names)
    asked = [p.input_ids for p in prompts(COMPLETIONS, resolve_columns(COMPLETIONS), tokenizer, task=kind)]
    # The longest reference has three tokens and an end token; sixteen more show a model that does not stop.
    answers = generate_texts(model, tokenizer, asked[:2], max_new_tokens=20)
    assert [p["prediction"] for p in found["predictions"]] == answers
    assert [p["references"] for p in found["predictions"]] == [["w4 w5", "w7 w8 w9"], ["w6"]]
    assert found["metrics"] == metrics.score(names, answers, [["w4 w5", "w7 w8 w9"], ["w6"]])
    assert found["rows"] == 3


def test_a_sample_is_spread_evenly_over_prompts_with_room(one_causal: Any, tokenizer: Any) -> None:
    size = one_causal.config.max_position_embeddings
    asked = [*(f"w{n}" for n in range(1, 9)), " ".join(["w1"] * size)]
    rows = Dataset.from_dict({"prompt": asked, "completion": ["w4 w5"] * 9})

    def answered(sample: Any) -> list[str]:
        settings = Settings(sample=sample, max_new_tokens=2)
        found = run(one_causal, tokenizer, rows, metrics=["exact_match"], settings=settings)
        assert found["answered"] == {"prompts": len(found["predictions"]), "of": 9}
        return [p["prompt"].strip() for p in found["predictions"]]

    assert answered(4) == ["w1", "w3", "w5", "w7"]
    assert answered("few") == answered(100) == asked[:8]
    with pytest.raises(DataError, match="leaves no room"):
        answered(None)
    # Nothing that can be answered is a score that nobody knows, not an error.
    none = run(one_causal, tokenizer, rows.select([8]), metrics=["exact_match"], settings=Settings(sample="few"))
    assert math.isnan(none["metrics"]["exact_match"]) and none["answered"] == {"prompts": 0, "of": 1}


def test_few_are_fewer_where_answers_are_long(one_causal: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inlay.evaluate.run.FEW_TOKENS", 8)
    rows = Dataset.from_dict({"prompt": [f"w{n}" for n in range(1, 9)], "completion": ["w4 w5"] * 8})
    found = run(one_causal, tokenizer, rows, metrics=["exact_match"], settings=Settings(sample="few"))
    assert found["answered"] == {"prompts": 2, "of": 8}  # two tokens and the end, twice


def test_labels_without_a_head_are_ranked(one_causal: Any, tokenizer: Any) -> None:
    found = run(one_causal, tokenizer, LABELLED)
    labels = ["w20", "w21", "w22"]
    for row, text in zip(found["predictions"], LABELLED["text"], strict=True):
        prompt = tokenizer(text).input_ids
        ids = [tokenizer(label).input_ids[0] for label in labels]
        rows = [{"input_ids": [*prompt, n, 1], "labels": [-100] * len(prompt) + [n, 1]} for n in ids]
        nats = row_nats(one_causal, tokenizer, rows)
        assert row["prediction"] == labels[nats.index(min(nats))]
    assert set(found["metrics"]) == set(DEFAULTS["classification"])
    with pytest.raises(DataError, match=r"row 4: label 'w22' was never seen in training"):
        run(one_causal, tokenizer, LABELLED, settings=Settings(label_names=["w20", "w21"]))


def test_a_head_and_its_labels(classifier: Any, tokenizer: Any) -> None:
    names = ["w22", "w21", "w20"]
    found = run(classifier, tokenizer, LABELLED, "classification", settings=Settings(label_names=names, batch_size=2))
    expected = []
    for text in LABELLED["text"]:
        with torch.no_grad():
            logits = classifier(input_ids=torch.tensor([tokenizer(text).input_ids])).logits[0]
        expected.append(names[int(logits.argmax())])
    assert [p["prediction"] for p in found["predictions"]] == expected
    assert found["metrics"]["accuracy"] == metrics.accuracy(expected, LABELLED["label"])


def test_regression(regressor: Any, tokenizer: Any) -> None:
    data = Dataset.from_dict({"text": LABELLED["text"], "label": [0.5, 2.5, 1.0, 4.0]})
    found = run(regressor, tokenizer, data, "regression")
    expected = []
    for text in data["text"]:
        with torch.no_grad():
            expected.append(float(regressor(input_ids=torch.tensor([tokenizer(text).input_ids])).logits[0, 0]))
    assert [p["prediction"] for p in found["predictions"]] == pytest.approx(expected, rel=1e-4)
    assert found["metrics"]["pearson"] == pytest.approx(metrics.pearson(expected, [0.5, 2.5, 1.0, 4.0]), rel=1e-4)


def test_long_text_is_scored_whole(one_causal: Any, tokenizer: Any) -> None:
    words = [f"w{n % 60}" for n in range(100)]
    found = run(one_causal, tokenizer, Dataset.from_dict({"text": [" ".join(words)]}))
    assert set(found["metrics"]) == {"loss", "perplexity", "bits_per_byte"}
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(found["metrics"]["loss"]))
    with pytest.raises(DataError, match="101 tokens"):
        run(
            one_causal,
            tokenizer,
            Dataset.from_dict({"text": [" ".join(words)]}),
            settings=Settings(on_long="error"),
        )


def test_metrics_that_do_not_suit_are_listed(one_causal: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        run(one_causal, tokenizer, COMPLETIONS, metrics=["acuracy", "pearson", "bleu"])
    assert "did you mean 'accuracy'" in str(caught.value) and "'pearson' is not for completion data" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match="no metric was given"):
        run(one_causal, tokenizer, COMPLETIONS, metrics=[])
    with pytest.raises(ConfigError, match="'bleu' is not for text data; choose from loss, perplexity, bits_per_byte"):
        run(one_causal, tokenizer, Dataset.from_dict({"text": ["w1 w2"]}), metrics=["bleu"])


def test_progress(one_causal: Any, tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    run(
        one_causal,
        tokenizer,
        COMPLETIONS,
        metrics=["loss", "exact_match"],
        settings=Settings(batch_size=2),
        progress=lambda *state: seen.append(state),
    )
    assert seen == [("likelihood", 2, 3), ("likelihood", 3, 3), ("texts", 2, 2)]
