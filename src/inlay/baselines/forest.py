"""A fitted random forest as plain arrays, so that it is stored and read without pickle.

    feature, threshold, left, right      one entry per node, all trees one after another; feature −1 is a leaf
    share (nodes, classes)               share of each class among the training rows in a node
    root                                 the first node of each tree

A row goes left if its feature, in single precision, is at most the threshold; the trees' shares are averaged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_tensors(forest: Any) -> dict[str, Tensor]:
    """The arrays of a fitted `sklearn.ensemble.RandomForestClassifier`."""
    parts: dict[str, list[Any]] = {name: [] for name in ("feature", "threshold", "left", "right", "share", "root")}
    start = 0
    for tree in (estimator.tree_ for estimator in forest.estimators_):
        leaf = tree.children_left < 0
        parts["feature"].append(np.where(leaf, -1, tree.feature))
        parts["threshold"].append(tree.threshold)
        parts["left"].append(np.where(leaf, -1, tree.children_left + start))
        parts["right"].append(np.where(leaf, -1, tree.children_right + start))
        shares = tree.value[:, 0, :]
        parts["share"].append(shares / shares.sum(1, keepdims=True))
        parts["root"].append(np.array([start]))
        start += tree.node_count
    whole = {name: torch.from_numpy(np.ascontiguousarray(np.concatenate(some))) for name, some in parts.items()}
    return {n: t if n in ("threshold", "share") else t.long() for n, t in whole.items()}


def probabilities(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The probability of each class: (rows, classes)."""
    feature, limits = tensors["feature"], tensors["threshold"]
    total = torch.zeros(len(x), tensors["share"].shape[1], dtype=torch.float64)
    wide = x.float().double()
    for root in tensors["root"].tolist():
        node = torch.full((len(x),), root, dtype=torch.long)
        while bool((inner := feature[node] >= 0).any()):
            value = wide.gather(1, feature[node].clamp(min=0)[:, None])[:, 0]
            below = torch.where(value <= limits[node], tensors["left"][node], tensors["right"][node])
            node = torch.where(inner, below, node)
        total += tensors["share"][node]
    return total / len(tensors["root"])
