"""Frozen embeddings and classifiers beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from inlay.baselines import artefact, forest
from inlay.baselines.embedding import embed
from inlay.baselines.scoring import evaluate_folder
from inlay.core.errors import AdapterFileError, BaseMismatchError, ConfigError, UserError
from inlay.data import read_table, resolve_columns
from inlay.train import load_base, read_record

Fit = Callable[..., Any]

TEXTS = ["the cat sits", "a dog", "red bird sang at dawn on the mat quickly"]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_embeddings_are_those_of_one_text_alone(bases: dict[str, Path], name: str, pooling: Any) -> None:
    """Padding and batching change nothing; the oracle is a bare transformers model."""
    base = load_base(bases[name], task="causal" if name == "llama" else "seq2seq" if name == "t5" else "classification")
    if pooling == "cls":
        base.tokenizer.cls_token = "</s>"
    rows = [{"input_ids": base.tokenizer(text)["input_ids"]} for text in TEXTS]
    found = embed(base.model, base.tokenizer, rows, pooling, batch_size=2)
    bare = AutoModel.from_pretrained(bases[name]).eval()
    bare = bare.encoder if name == "t5" else bare
    tokenizer = AutoTokenizer.from_pretrained(bases[name])
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = bare(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        wanted = {"mean": states.mean(0), "last": states[-1], "cls": states[0]}[pooling]
        assert torch.allclose(vector, wanted, atol=1e-5)


def test_no_cls_token_is_said(bases: dict[str, Path], labelled: Path, fit: Fit) -> None:
    with pytest.raises(ConfigError, match="has no CLS token; give pooling=mean"):
        fit("llama", labelled, "features", {"pooling": "cls"})


@pytest.mark.parametrize("classifier", ["logistic", "forest", "xgboost"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_fitted_stored_and_scored(fit: Fit, labelled: Path, name: str, classifier: str) -> None:
    if classifier == "xgboost":
        pytest.importorskip("xgboost", reason="the extra dev has xgboost on Linux and x86-64 only")
    result = fit(name, labelled, "features", {"classifier": classifier, "trees": 20, "c": 100.0}, eval_share=0.2)
    assert result.trainable == 0 and set(result.metrics) == {"eval_accuracy", "eval_macro_f1", "eval_matthews"}
    files = {file.name for file in result.adapter.iterdir()}
    assert {"baseline.json", "baseline.safetensors", "training.json", "README.md"} <= files
    assert ("xgboost.json" in files) == (classifier == "xgboost")
    data = read_table(str(labelled))
    scored = evaluate_folder(result.adapter, data, resolve_columns(data))
    assert scored.evaluation["metrics"]["accuracy"] > 0.6  # most of these rows were its training rows
    assert scored.evaluation["rows"] == 60 and scored.base is not None
    card = (result.adapter / "README.md").read_text()
    assert "No parameter of the base is trained" in card and classifier in card


def test_logistic_weights_are_sklearns() -> None:
    from sklearn.linear_model import LogisticRegression

    from inlay.baselines.baseline import Fitted
    from inlay.baselines.features import Features, _logistic

    draw = np.random.default_rng(0)
    for classes in (2, 4):
        z, y = draw.normal(size=(50, 6)), draw.integers(0, classes, 50)
        method = Features(c=0.5)
        fitted = Fitted(tensors=_logistic(method, z, y, classes))
        ours = method.scores(fitted, torch.from_numpy(z)).softmax(1).numpy()
        theirs = LogisticRegression(C=0.5, max_iter=2000).fit(z, y).predict_proba(z)
        assert np.allclose(ours, theirs, atol=1e-6)
    without_last = _logistic(Features(), z, np.minimum(y, 2), 5)  # classes 3 and 4 have no row
    scores = Features().scores(Fitted(tensors=without_last), torch.from_numpy(z))
    assert int(scores.argmax(1).max()) <= 2


def test_forest_arrays_are_sklearns() -> None:
    from sklearn.ensemble import RandomForestClassifier

    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(120, 5)).astype(np.float32), draw.integers(0, 3, 120)
    trees = RandomForestClassifier(n_estimators=30, random_state=0).fit(x, y)
    fresh = draw.normal(size=(200, 5)).astype(np.float32)
    whole = RandomForestClassifier(n_estimators=30, random_state=0).fit(np.round(x * 2), y)
    halves = np.round(fresh * 4) / 2 + 0.5  # where the thresholds between whole numbers lie
    for fitted, rows in ((trees, fresh), (whole, halves.astype(np.float32))):
        ours = forest.probabilities(forest.to_tensors(fitted), torch.from_numpy(rows))
        assert np.allclose(ours.numpy(), fitted.predict_proba(rows), atol=1e-12)


def test_the_seed_and_the_base_decide(fit: Fit, labelled: Path, bases: dict[str, Path]) -> None:
    again = [fit("bert", labelled, "features", {"classifier": "forest", "trees": 5}, seed=s) for s in (3, 3, 4)]
    stored = [(run.adapter / "baseline.safetensors").read_bytes() for run in again]
    assert stored[0] == stored[1] != stored[2]
    before = {f: f.read_bytes() for f in bases["bert"].iterdir()}
    assert all(f.read_bytes() == b for f, b in before.items())
    data = read_table(str(labelled))
    with pytest.raises(BaseMismatchError, match="fitted on another base"):
        evaluate_folder(again[0].adapter, data, resolve_columns(data), base=str(bases["llama"]))


def test_nothing_is_unpickled(fit: Fit, labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    result = fit("bert", labelled, "features", {"classifier": "forest", "trees": 5})

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    assert artefact.read(result.adapter).fitted.tensors["root"].shape == (5,)


def test_damaged_folders_are_refused(fit: Fit, labelled: Path) -> None:
    folder = fit("bert", labelled, "features").adapter
    text = (folder / "baseline.json").read_text()
    for bad in (
        "{",
        text.replace('"format": 1', '"format": 9'),
        text.replace('"texts": []', '"texts": ["../run.yaml"]'),
    ):
        (folder / "baseline.json").write_text(bad)
        with pytest.raises(AdapterFileError, match="not a complete baseline"):
            artefact.read(folder)
    (folder / "baseline.json").write_text(text)
    (folder / "baseline.safetensors").write_bytes(b"12")
    with pytest.raises(AdapterFileError, match="not a complete baseline"):
        artefact.read(folder)


def test_a_missing_package_is_named(fit: Fit, labelled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from inlay.baselines import features

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(features, "import_module", absent)
    with pytest.raises(UserError, match="not installed: pip install xgboost"):
        fit("bert", labelled, "features", {"classifier": "xgboost"}, out=str(tmp_path / "none"))
    with pytest.raises(UserError, match="not installed: pip install scikit-learn"):
        fit("bert", labelled, "features", out=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        ({"classifier": "svm"}, {}, "classifier='svm' is not"),
        ({"tres": 3}, {}, "unknown hyper-parameter 'tres'; did you mean 'trees'"),
        ({"c": 0.0}, {}, "c is 0.0"),
        ({}, {"learning_rate": 1e-3, "where": "attention"}, "where is given, but nothing is trained"),
        ({}, {"task": "causal"}, "method 'features' only classifies"),
    ],
)
def test_what_makes_no_sense_is_refused(fit: Fit, labelled: Path, settings: Any, more: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fit("bert", labelled, "features", settings, **more)


def test_other_data_is_refused(fit: Fit, completions: Path) -> None:
    with pytest.raises(ConfigError, match="only classifies; use another method for completion"):
        fit("bert", completions, "features")


def test_a_run_can_be_repeated_from_its_file(fit: Fit, labelled: Path, tmp_path: Path) -> None:
    from inlay.baselines.running import run
    from inlay.train.config import RunConfig

    first = fit("bert", labelled, "features", {"pooling": "last"})
    config = RunConfig.read(first.out / "run.yaml", out=str(tmp_path / "again"))
    second = run(config)
    stored = [(r.adapter / "baseline.safetensors").read_bytes() for r in (first, second)]
    assert stored[0] == stored[1] and second.metrics == first.metrics
    assert run(RunConfig.read(first.out / "run.yaml"), resume=True) == first
    record = read_record(first.adapter)
    assert record is not None and record.labels == ("cat", "dog", "neither")
    assert json.loads((first.out / "result.json").read_text())["trainable"] == 0
