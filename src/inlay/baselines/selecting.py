"""Which training rows become demonstrations, the best one first.

    random     drawn with the seed                        first     in the order of the data
    balanced   drawn with the seed, labels alternating    longest   most tokens first
    nearest    most similar to the question, by the cosine of the base's mean embeddings (Liu et al. 2022,
               arXiv:2101.06804, kNN)

All but `nearest` choose once, for all questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.errors import ConfigError
from inlay.data import Prompt

Strategy = Literal["random", "balanced", "nearest", "longest", "first"]


def fixed(strategy: Strategy, rows: Sequence[Prompt], k: int, seed: int, labels: Sequence[str] | None) -> list[int]:
    """The indices of the k best rows.

    Raises:
        ConfigError: `balanced` was asked for, but there are no labels.
    """
    drawn = [int(n) for n in np.random.default_rng(seed).permutation(len(rows))]
    match strategy:
        case "random":
            return drawn[:k]
        case "first":
            return list(range(min(k, len(rows))))
        case "longest":
            return sorted(range(len(rows)), key=lambda n: -len(rows[n].input_ids))[:k]
        case "balanced":
            if labels is None:
                raise ConfigError("strategy=balanced needs labels; for texts choose random, nearest, longest or first")
            return _in_turn([[n for n in drawn if rows[n].reference == label] for label in labels], k)
    raise ConfigError(f"strategy {strategy!r} chooses anew for every question")


def nearest(pool: Tensor, questions: Tensor, k: int) -> list[list[int]]:
    """For each question the indices of the k most similar rows of the pool; the first ones if several are equal."""
    alike = F.normalize(questions, dim=1) @ F.normalize(pool, dim=1).T  # (questions, pool)
    order: list[list[int]] = torch.argsort(alike, dim=1, descending=True, stable=True)[:, :k].tolist()
    return order


def _in_turn(groups: Sequence[list[int]], k: int) -> list[int]:
    deepest = max((len(group) for group in groups), default=0)
    return [group[turn] for turn in range(deepest) for group in groups if turn < len(group)][:k]
