from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inlay.core.errors import DataError
from inlay.evaluate.likelihood import IGNORED, Likelihood, likelihood, rank_labels, row_nats

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]},
    {"input_ids": [9, 4], "labels": [9, 4]},
    {"input_ids": [5, 5, 5, 5, 5, 1], "labels": [IGNORED, 5, IGNORED, 5, 5, 1]},
]


def by_hand(model: Any, row: dict[str, list[int]]) -> float:
    """One row alone, one token at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    places = [n for n, label in enumerate(row["labels"]) if label != IGNORED and n > 0]
    return -sum(float(logits[n - 1].log_softmax(-1)[row["labels"][n]]) for n in places)


def test_rows_by_hand(causal: Any, tokenizer: Any) -> None:
    found = row_nats(causal, tokenizer, ROWS, batch_size=2)
    assert found == pytest.approx([by_hand(causal, row) for row in ROWS], rel=1e-5)


def test_an_encoder_decoder_scores_every_label(seq2seq: Any, tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [9, 1]}, {"input_ids": [8], "labels": [4, 4, 4, 1]}]
    expected = []
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            mean = seq2seq(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        expected.append(float(mean) * labels.shape[1])
    assert row_nats(seq2seq, tokenizer, rows) == pytest.approx(expected, rel=1e-5)
    assert likelihood(seq2seq, tokenizer, rows).tokens == 6


def test_totals(causal: Any, tokenizer: Any) -> None:
    found = likelihood(causal, tokenizer, ROWS, batch_size=3)
    # The first token of the second row has nothing before it; the end-of-text token spells no bytes.
    assert found.tokens == 2 + 1 + 4
    assert found.nbytes == len("w4 w5") + len("w1") + len("w2 w2 w2")
    assert found.nats == pytest.approx(sum(by_hand(causal, row) for row in ROWS), rel=1e-5)


def test_derived_scores() -> None:
    found = Likelihood(nats=8 * math.log(4), tokens=8, nbytes=16)
    assert (found.loss, found.perplexity, found.bits_per_byte) == pytest.approx((math.log(4), 4, 1))


def test_nothing_to_score_is_refused(causal: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="none of the 1 rows"):
        likelihood(causal, tokenizer, [{"input_ids": [3, 4], "labels": [3, IGNORED]}])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.integers(3, 60), min_size=2, max_size=9), min_size=1, max_size=6))
def test_batches_do_not_matter(causal: Any, tokenizer: Any, rows: list[list[int]]) -> None:
    data = [{"input_ids": row, "labels": row} for row in rows]
    alone = row_nats(causal, tokenizer, data, batch_size=1)
    assert row_nats(causal, tokenizer, data, batch_size=4) == pytest.approx(alone, rel=1e-4)


def check_ranking(model: Any, tokenizer: Any, *, normalised: bool) -> None:
    prompts, labels = [[5, 6], [7, 8, 9], [10]], [[11], [12, 13, 14], [15, 16]]
    expected = []
    for prompt in prompts:
        rows: list[Any] = [{"input_ids": prompt, "labels": label} for label in labels]
        if not model.config.is_encoder_decoder:
            rows = [{"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + ids} for ids in labels]
        nats = [row_nats(model, tokenizer, [row])[0] for row in rows]
        means = [n / (len(ids) if normalised else 1) for n, ids in zip(nats, labels, strict=True)]
        expected.append(means.index(min(means)))
    found = rank_labels(model, tokenizer, prompts, labels, length_normalised=normalised, batch_size=4)
    assert found == expected


@pytest.mark.parametrize("normalised", [True, False])
def test_label_ranking(causal: Any, tokenizer: Any, normalised: bool) -> None:
    check_ranking(causal, tokenizer, normalised=normalised)


def test_label_ranking_of_an_encoder_decoder(seq2seq: Any, tokenizer: Any) -> None:
    check_ranking(seq2seq, tokenizer, normalised=True)


def test_a_label_without_tokens_is_refused(causal: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="labels without tokens: 2"):
        rank_labels(causal, tokenizer, [[5]], [[6], []])
