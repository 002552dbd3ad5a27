"""How probable a model finds given texts: the negative log-likelihood, in nats, summed over the scored tokens.

Rows are as in training: ``input_ids`` and ``labels`` (−100 at tokens that are context only). In a decoder-only model a
label stands at its own token and is predicted from the token before it; in an encoder–decoder the labels are the
decoder's sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.errors import DataError
from inlay.data import IGNORED
from inlay.evaluate import metrics
from inlay.evaluate.batches import by_length, evaluating, pad, padding_id
from inlay.evaluate.progress import Advance

Row = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Negative log-likelihood of a set of rows.

    Attributes:
        nats: sum over the scored tokens.
        tokens: number of scored tokens.
        nbytes: number of UTF-8 bytes of the scored tokens; an end-of-text token has none.
    """

    nats: float
    tokens: int
    nbytes: int

    @property
    def loss(self) -> float:
        """Nats per token, averaged over all tokens (not a mean of row means)."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return metrics.perplexity(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return metrics.bits_per_byte(self.nats, self.nbytes)


def likelihood(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, batch_size: int = 8, progress: Advance | None = None
) -> Likelihood:
    """The negative log-likelihood of rows.

    Args:
        progress: called after each batch with the number of its rows.

    Raises:
        DataError: no token of any row is scored.
    """
    scored = [_scored(model, row) for row in rows]
    tokens = sum(len(row) for row in scored)
    if tokens == 0:
        raise DataError(f"none of the {len(rows)} rows has a token to score; expected labels other than {IGNORED}")
    texts = tokenizer.batch_decode(scored, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    nats = row_nats(model, tokenizer, rows, batch_size=batch_size, progress=progress)
    return Likelihood(nats=math.fsum(nats), tokens=tokens, nbytes=sum(len(t.encode()) for t in texts))


def row_nats(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, batch_size: int = 8, progress: Advance | None = None
) -> list[float]:
    """Summed nats of each row's scored tokens, in the order of the rows."""
    filler = padding_id(model, tokenizer)
    nats = [0.0] * len(rows)
    with evaluating(model) as device:
        for batch in by_length([len(row["input_ids"]) for row in rows], batch_size):
            inputs = [rows[n]["input_ids"] for n in batch]
            # Padded on the right, so that absolute positions count from the first real token in every model.
            ids = pad(inputs, filler, "right").to(device)
            mask = pad([[1] * len(row) for row in inputs], 0, "right").to(device)
            labels = pad([rows[n]["labels"] for n in batch], IGNORED, "right").to(device)
            for n, value in zip(batch, _batch_nats(model, ids, mask, labels), strict=True):
                nats[n] = value
            if progress is not None:
                progress(len(batch))
    return nats


def rank_labels(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    length_normalised: bool = True,
    batch_size: int = 8,
    progress: Advance | None = None,
) -> list[int]:
    """The most probable of the labels after each prompt: classification without a head.

    Args:
        prompts: token ids.
        labels: token ids of each candidate.
        length_normalised: compare nats per token; otherwise nats, which favour short labels.

    Returns:
        The index of the chosen label for each prompt; the first one if several are equal.
    """
    empty = [str(n) for n, label in enumerate(labels, 1) if not label]
    if empty or not labels:
        raise DataError(f"labels without tokens: {', '.join(empty) or 'no label was given'}")
    rows = [_candidate(model, prompt, label) for prompt in prompts for label in labels]
    nats = row_nats(model, tokenizer, rows, batch_size=batch_size, progress=progress)
    lengths = [len(label) if length_normalised else 1 for label in labels]
    scores = torch.tensor(nats, dtype=torch.float64).view(len(prompts), len(labels))  # (prompts, labels)
    return [int(n) for n in (scores / torch.tensor(lengths)).argmin(1)]


def _candidate(model: Any, prompt: Sequence[int], label: Sequence[int]) -> Row:
    if model.config.is_encoder_decoder:
        return {"input_ids": prompt, "labels": label}
    return {"input_ids": [*prompt, *label], "labels": [IGNORED] * len(prompt) + [*label]}


def _scored(model: Any, row: Row) -> list[int]:
    # In a decoder-only model there is nothing from which the first token could be predicted.
    labels = row["labels"] if model.config.is_encoder_decoder else row["labels"][1:]
    return [token for token in labels if token != IGNORED]


def _batch_nats(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> list[float]:
    if model.config.is_encoder_decoder:
        logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    else:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        labels = labels[:, 1:]
    scored = labels != IGNORED  # (rows, time)
    # Only the scored positions are converted: logits over a big vocabulary in float32 take most of the memory here.
    each = F.cross_entropy(logits[scored].float(), labels[scored], reduction="none").double()
    total = torch.zeros(len(labels), dtype=torch.float64, device=each.device)
    total.index_add_(0, scored.nonzero()[:, 0], each)
    return [float(value) for value in total]
