"""Feature-based: the frozen base embeds a text, and a small classifier is trained on the embeddings.

    z = (pool(h(x)) − μ) / σ          h: the base's last hidden states; μ, σ over the training rows
    logistic    argmax W z + b, L2 penalty 1 / c        forest    mean over `trees` trees
    xgboost     boosted trees (needs its package)

The oldest use of a pre-trained model (Peters et al. 2019, arXiv:1903.05987, call it feature extraction). Fitted
classifiers are stored as numbers: weights, arrays of trees, XGBoost's own JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from inlay.baselines import forest
from inlay.baselines.baseline import Baseline, Fitted, Rows
from inlay.baselines.embedding import Pooling, embed, trunk
from inlay.core.errors import ConfigError, UserError
from inlay.data import Layout, OnLong, Task, encode
from inlay.evaluate.run import Prediction

Classifier = Literal["logistic", "forest", "xgboost"]
_BOOSTER = "xgboost.json"
_ROUNDS = 2000  # iterations of L-BFGS


@dataclass(frozen=True, kw_only=True)
class Features(Baseline):
    """A classifier on frozen embeddings.

    Attributes:
        classifier: logistic, forest or xgboost.
        pooling: cls, mean or last.
        c: inverse strength of the logistic regression's penalty.
        trees: number of trees of a forest, or of rounds of XGBoost.
        depth: depth of a tree; None is unlimited in a forest, and XGBoost's default 6.
        rate: XGBoost's shrinkage.
    """

    name: ClassVar[str] = "features"
    paper: ClassVar[str] = "arXiv:1903.05987"
    on_long: ClassVar[tuple[OnLong, ...]] = ("error", "truncate")

    classifier: Classifier = "logistic"
    pooling: Pooling = "mean"
    c: float = 1.0
    trees: int = 300
    depth: int | None = None
    rate: float = 0.3

    def __post_init__(self) -> None:
        self.require(
            (self.c > 0, f"c is {self.c}, expected more than 0"),
            (self.trees >= 1, f"trees is {self.trees}, expected at least 1"),
            (self.depth is None or self.depth >= 1, f"depth is {self.depth}, expected at least 1"),
            (0 < self.rate <= 1, f"rate is {self.rate}, expected above 0 and up to 1"),
        )

    def task(self, layout: Layout, asked: Task | None, source: str) -> Task:
        if layout.kind != "classification" or asked not in (None, "classification"):
            raise ConfigError(f"method 'features' only classifies; use another method for {asked or layout.kind}")
        return "classification"

    def seen(self, model: Any) -> Any:
        return trunk(model)

    def fit(self, rows: Rows) -> Fitted:
        assert rows.labels is not None
        found, x = _embedded(self, rows)
        y = np.array([row["labels"] for row in found])
        mean, scale = x.mean(0), x.std(0, correction=0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        z = ((x - mean) / scale).numpy()
        tensors: dict[str, Tensor] = {}
        texts: dict[str, str] = {}
        match self.classifier:
            case "logistic":
                tensors = _logistic(self, z, y, len(rows.labels))
            case "forest":
                tensors = _forest(self, z, y, rows)
            case "xgboost":
                texts = {_BOOSTER: _boosted(self, z, y, rows)}
        count = sum(t.numel() for t in tensors.values())
        return Fitted(tensors={"mean": mean, "scale": scale, **tensors}, texts=texts, parameters=count)

    def predict(self, fitted: Fitted, rows: Rows) -> tuple[list[Prediction], dict[str, Any]]:
        assert rows.labels is not None
        found, x = _embedded(self, rows)
        z = (x - fitted.tensors["mean"]) / fitted.tensors["scale"]
        chosen = self.scores(fitted, z).argmax(1).tolist()
        texts = [str(text) for text in rows.dataset[rows.layout.column("text")]]
        wanted = [rows.labels[row["labels"]] for row in found]
        both = zip(texts, chosen, wanted, strict=True)
        return [Prediction(prompt=t, prediction=rows.labels[n], references=[r]) for t, n, r in both], {}

    def scores(self, fitted: Fitted, z: Tensor) -> Tensor:
        """The score of each class, (rows, classes), from standardised features."""
        match self.classifier:
            case "logistic":
                return z.double() @ fitted.tensors["weight"].T + fitted.tensors["bias"]
            case "forest":
                return forest.probabilities(fitted.tensors, z)
        booster = _package("xgboost").Booster()
        booster.load_model(bytearray(fitted.texts[_BOOSTER].encode()))
        return torch.from_numpy(booster.predict(_package("xgboost").DMatrix(z.numpy())))


def _embedded(method: Features, rows: Rows) -> tuple[list[dict[str, Any]], Tensor]:
    """The encoded rows and their embeddings."""
    encoded = encode(
        rows.dataset,
        rows.layout,
        rows.tokenizer,
        task="classification",
        max_length=rows.max_length,
        label_names=rows.labels,
        template=rows.template,
        on_long=rows.on_long,
    )
    found = list(encoded)
    stage = rows.stage("embeddings", len(found))
    return found, embed(rows.model, rows.tokenizer, found, method.pooling, batch_size=rows.batch_size, progress=stage)


def _logistic(method: Features, z: np.ndarray[Any, Any], y: np.ndarray[Any, Any], classes: int) -> dict[str, Tensor]:
    linear = _package("sklearn.linear_model").LogisticRegression(C=method.c, max_iter=_ROUNDS).fit(z, y)
    # A class without a training row is never chosen; for two classes sklearn only has the second one's weights.
    weight, bias = torch.zeros(classes, z.shape[1]).double(), torch.full((classes,), -torch.inf).double()
    rows, offsets = torch.from_numpy(linear.coef_).double(), torch.from_numpy(linear.intercept_).double()
    if len(rows) == 1:
        rows, offsets = torch.cat([torch.zeros_like(rows), rows]), torch.cat([torch.zeros_like(offsets), offsets])
    weight[linear.classes_], bias[linear.classes_] = rows, offsets
    return {"weight": weight, "bias": bias}


def _forest(method: Features, z: np.ndarray[Any, Any], y: np.ndarray[Any, Any], rows: Rows) -> dict[str, Tensor]:
    assert rows.labels is not None
    trees = _package("sklearn.ensemble").RandomForestClassifier(
        n_estimators=method.trees, max_depth=method.depth, random_state=rows.seed
    )
    tensors = forest.to_tensors(trees.fit(z, y))
    share = torch.zeros(len(tensors["share"]), len(rows.labels), dtype=torch.float64)
    share[:, torch.from_numpy(trees.classes_)] = tensors["share"]
    return {**tensors, "share": share}


def _boosted(method: Features, z: np.ndarray[Any, Any], y: np.ndarray[Any, Any], rows: Rows) -> str:
    assert rows.labels is not None
    xgboost = _package("xgboost")
    options = {"objective": "multi:softprob", "num_class": len(rows.labels), "eta": method.rate, "seed": rows.seed}
    options |= {} if method.depth is None else {"max_depth": method.depth}
    booster = xgboost.train(options, xgboost.DMatrix(z, label=y), num_boost_round=method.trees)
    return bytes(booster.save_raw("json")).decode()


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(name.partition(".")[0], name)
        raise UserError(
            f"method 'features' with this classifier needs a package that is not installed: pip install {package}"
        ) from error
