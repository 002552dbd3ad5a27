"""Scores of predictions against references, each computed by its usual library.

Texts are scored by sacrebleu and rouge-score, labels by scikit-learn, numbers by scipy, on the libraries' own scales
(`METRICS[name].scale`): BLEU is in 0–100, a share in 0–1, a correlation in −1–1. An undefined score (a correlation with
    a
constant) is ``nan``, never a made-up number.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from inlay.core.errors import ConfigError, DataError, UserError, nearest, problems

Kind = Literal["text", "label", "number"]
Label = str | int
References = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One score: what it compares, the range of its values, and the function."""

    kind: Kind
    scale: str
    function: Callable[[Any, Any], float]


def perplexity(nats: float, tokens: int) -> float:
    """exp(nats per token). Args: the summed negative log-likelihood, the tokens it is summed over."""
    _positive("tokens", tokens)
    mean = nats / tokens
    return math.exp(mean) if mean < 700 else math.inf


def bits_per_byte(nats: float, nbytes: int) -> float:
    """Bits that the model needs per byte of text; comparable between tokenizers and with compressors."""
    _positive("bytes", nbytes)
    return nats / math.log(2) / nbytes


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Share of the predictions that equal one of their references, apart from white space at the ends."""
    _same_length(predictions, references)
    hits = [p.strip() in {r.strip() for r in row} for p, row in zip(predictions, references, strict=True)]
    return sum(hits) / len(hits)


def bleu(predictions: Sequence[str], references: References) -> float:
    """Corpus BLEU of sacrebleu (13a tokenizer, exponential smoothing), 0–100.

    Args:
        predictions: one text for each row.
        references: one or more texts for each row; their number may differ from row to row.
    """
    _same_length(predictions, references)
    most = max(len(row) for row in references)
    # sacrebleu takes the n-th reference of every row as one stream, with None for rows that have fewer.
    streams = [[row[n] if n < len(row) else None for row in references] for n in range(most)]
    sacrebleu = _package("sacrebleu", "bleu")
    return float(sacrebleu.corpus_bleu(list(predictions), streams, force=True).score)


def rouge(
    predictions: Sequence[str], references: References, kinds: Sequence[str] = ("rouge1", "rouge2", "rougeL")
) -> dict[str, float]:
    """Mean F-measure of rouge-score, 0–1, without stemming; each row counts with its best reference.

    Args:
        kinds: some of ``rouge1``, ``rouge2``, ``rougeL`` and ``rougeLsum`` (one sentence per line).
    """
    _same_length(predictions, references)
    scorer = _package("rouge_score.rouge_scorer", "rouge").RougeScorer(list(kinds), use_stemmer=False)
    rows = [scorer.score_multi(list(row), p) for p, row in zip(predictions, references, strict=True)]
    return {kind: math.fsum(row[kind].fmeasure for row in rows) / len(rows) for kind in kinds}


def accuracy(predictions: Sequence[Label], references: Sequence[Label]) -> float:
    """Share of equal labels."""
    _same_length(predictions, references)
    sklearn = _package("sklearn.metrics", "accuracy")
    return float(sklearn.accuracy_score(list(references), list(predictions)))


def macro_f1(predictions: Sequence[Label], references: Sequence[Label]) -> float:
    """F1 averaged over the labels that occur; a label that is never predicted counts as zero."""
    _same_length(predictions, references)
    sklearn = _package("sklearn.metrics", "macro_f1")
    return float(sklearn.f1_score(list(references), list(predictions), average="macro", zero_division=0.0))


def matthews(predictions: Sequence[Label], references: Sequence[Label]) -> float:
    """Matthews correlation (multi-class too); zero if one side has only one label, as usual."""
    _same_length(predictions, references)
    sklearn = _package("sklearn.metrics", "matthews")
    return float(sklearn.matthews_corrcoef(list(references), list(predictions)))


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Linear correlation; ``nan`` if one side is constant."""
    return _correlation("pearsonr", predictions, references)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Rank correlation, ties with their mean rank; ``nan`` if one side is constant."""
    return _correlation("spearmanr", predictions, references)


def _rouge(kind: str) -> Callable[[Any, Any], float]:
    return lambda predictions, references: rouge(predictions, references, [kind])[kind]


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric(kind="text", scale="0–1", function=exact_match),
    "bleu": Metric(kind="text", scale="0–100", function=bleu),
    "rouge1": Metric(kind="text", scale="0–1", function=_rouge("rouge1")),
    "rouge2": Metric(kind="text", scale="0–1", function=_rouge("rouge2")),
    "rougeL": Metric(kind="text", scale="0–1", function=_rouge("rougeL")),
    "rougeLsum": Metric(kind="text", scale="0–1", function=_rouge("rougeLsum")),
    "accuracy": Metric(kind="label", scale="0–1", function=accuracy),
    "macro_f1": Metric(kind="label", scale="0–1", function=macro_f1),
    "matthews": Metric(kind="label", scale="−1–1", function=matthews),
    "pearson": Metric(kind="number", scale="−1–1", function=pearson),
    "spearman": Metric(kind="number", scale="−1–1", function=spearman),
}


def score(names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Compute the named metrics, in the order of the names.

    Args:
        names: keys of `METRICS`, all of one kind.
        predictions: one text, label or number for each row.
        references: a list of texts for each row, or one label or number for each row.

    Raises:
        ConfigError: an unknown name, or names of different kinds.
        DataError: there are no rows, or not as many predictions as references.
    """
    wrong = [f"no metric {name!r}{nearest(name, METRICS)}" for name in names if name not in METRICS]
    if wrong:
        raise ConfigError(problems("metrics", wrong))
    kinds = {METRICS[name].kind for name in names}
    if len(kinds) > 1:
        raise ConfigError(f"metrics of different kinds cannot be scored together: {', '.join(names)}")
    return {name: METRICS[name].function(predictions, references) for name in names}


def _correlation(function: str, predictions: Sequence[float], references: Sequence[float]) -> float:
    _same_length(predictions, references)
    if len(set(predictions)) < 2 or len(set(references)) < 2:
        return math.nan
    stats = _package("scipy.stats", "correlation")
    return float(getattr(stats, function)(list(predictions), list(references)).statistic)


def _package(name: str, metric: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        module = name.partition(".")[0]
        package = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}.get(module, module)
        raise UserError(
            f"the metric {metric!r} needs a package that is not installed: pip install {package}"
        ) from error


def _positive(what: str, count: int) -> None:
    if count <= 0:
        raise DataError(f"nothing was scored: {count} {what}; expected at least one")


def _same_length(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} rows of references")
    if not predictions:
        raise DataError("no rows to score; expected at least one")
    empty = [str(n) for n, row in enumerate(references, 1) if isinstance(row, list | tuple) and not row]
    if empty:
        raise DataError(f"rows without a reference: {', '.join(empty[:20])}")
