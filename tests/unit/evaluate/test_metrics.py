"""Golden values are worked out by hand in the comments."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.core.errors import ConfigError, DataError, UserError
from inlay.evaluate import metrics


def test_perplexity_and_bits_per_byte() -> None:
    # Eight tokens, each of probability 1/4, that spell 16 bytes: perplexity 4, 16 bits for 16 bytes.
    nats = 8 * math.log(4)
    assert metrics.perplexity(nats, 8) == pytest.approx(4.0)
    assert metrics.bits_per_byte(nats, 16) == pytest.approx(1.0)
    assert metrics.perplexity(1e6, 1) == math.inf


def test_exact_match_any_reference_and_outer_space() -> None:
    assert metrics.exact_match([" a b\n", "a  b", "C"], [["x", "a b"], ["a b"], ["c"]]) == pytest.approx(1 / 3)


def test_bleu_by_hand() -> None:
    # Precisions of "the cat is on the mat": 1-grams 5/6, 2-grams 3/5, 3-grams 1/4, 4-grams 0/3, which
    # exponential smoothing makes 1/(2·3); the lengths are equal, so there is no brevity penalty.
    by_hand = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert metrics.bleu(["the cat is on the mat"], [["the cat sat on the mat"]]) == pytest.approx(by_hand)


def test_bleu_uses_every_reference_and_ragged_numbers_of_them() -> None:
    predictions = ["the cat is on the mat", "there is a dog in the house"]
    references = [["the cat sat on the mat", "the cat is on the mat"], ["there is a dog in the house"]]
    assert metrics.bleu(predictions, references) == pytest.approx(100.0)
    assert metrics.bleu(predictions, [row[:1] for row in references]) < 100.0


def test_bleu_brevity_penalty() -> None:
    # Five words of ten, all in order: every precision is 1, the penalty is exp(1 - 10/5).
    assert metrics.bleu(["a b c d e"], [["a b c d e f g h i j"]]) == pytest.approx(100 * math.exp(-1))


def test_rouge_by_hand() -> None:
    # 5 of 6 words, 3 of 5 pairs; the longest common subsequence is "the cat on the mat".
    found = metrics.rouge(["the cat is on the mat"], [["the cat sat on the mat"]])
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})


def test_rouge_takes_the_best_reference() -> None:
    both = [["nothing in common", "the cat sat on the mat"]]
    assert metrics.rouge(["the cat is on the mat"], both)["rougeL"] == pytest.approx(5 / 6)


def test_rouge_lsum_joins_sentences_that_rouge_l_orders() -> None:
    # Two sentences in the other order: by sentence all is found, in sequence only half.
    found = metrics.rouge(["c d\na b"], [["a b\nc d"]], ["rougeL", "rougeLsum"])
    assert found == pytest.approx({"rougeL": 0.5, "rougeLsum": 1.0})


def test_classification_by_hand() -> None:
    references, predictions = ["a", "a", "a", "b", "b", "c"], ["a", "a", "b", "b", "a", "b"]
    assert metrics.accuracy(predictions, references) == pytest.approx(3 / 6)
    # F1: a = 2·2/(3+3), b = 2·1/(3+2), c = 0.
    assert metrics.macro_f1(predictions, references) == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)


def test_matthews_by_hand() -> None:
    # tp 3, tn 2, fp 1, fn 2: (3·2 - 1·2) / sqrt(4·5·3·4).
    references, predictions = [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0]
    assert metrics.matthews(predictions, references) == pytest.approx(4 / math.sqrt(240))
    assert metrics.matthews([0, 0, 0], [0, 1, 1]) == 0.0


def test_correlations_by_hand() -> None:
    # Deviations (-1.5, -.5, .5, 1.5) and (-2, -1, 0, 3): 8 / sqrt(5 · 14); the order is the same.
    assert metrics.pearson([1, 3, 5, 10], [1, 3, 5, 10]) == pytest.approx(1.0)
    assert metrics.pearson([1, 2, 3, 4], [1, 2, 3, 6]) == pytest.approx(8 / math.sqrt(70))
    assert metrics.spearman([1, 2, 3, 4], [1, 2, 3, 60]) == pytest.approx(1.0)
    # Ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4): 4.5 / sqrt(4.5 · 5).
    assert metrics.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(metrics.pearson([1.0, 1.0], [1.0, 2.0]))


def test_score_keeps_the_order_and_names_the_nearest() -> None:
    found = metrics.score(["rougeL", "exact_match"], ["a b"], [["a b"]])
    assert list(found.items()) == [("rougeL", 1.0), ("exact_match", 1.0)]
    with pytest.raises(ConfigError, match="did you mean 'rougeL'"):
        metrics.score(["rouge_L"], ["a"], [["a"]])
    with pytest.raises(ConfigError, match="different kinds"):
        metrics.score(["bleu", "accuracy"], ["a"], [["a"]])


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match="2 predictions for 1"):
        metrics.exact_match(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="no rows"):
        metrics.accuracy([], [])
    with pytest.raises(DataError, match="rows without a reference: 2"):
        metrics.bleu(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="nothing was scored"):
        metrics.perplexity(0.0, 0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(UserError, match="not installed: pip install sacrebleu"):
        metrics.bleu(["a"], [["a"]])


words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), min_size=4, max_size=8).map(" ".join)


@given(st.lists(words, min_size=1, max_size=4), words)
def test_more_references_never_lower_rouge_or_exact_match(references: list[str], prediction: str) -> None:
    for n in range(1, len(references)):
        fewer, more = [references[:n]], [references[: n + 1]]
        assert metrics.rouge([prediction], more)["rougeL"] >= metrics.rouge([prediction], fewer)["rougeL"]
        assert metrics.exact_match([prediction], more) >= metrics.exact_match([prediction], fewer)


@given(st.lists(words, min_size=1, max_size=4))
def test_a_copy_of_the_reference_scores_full(texts: list[str]) -> None:
    found = metrics.score(["exact_match", "bleu", "rouge1", "rouge2", "rougeL"], texts, [[t] for t in texts])
    assert found == pytest.approx({"exact_match": 1, "bleu": 100, "rouge1": 1, "rouge2": 1, "rougeL": 1})
