"""Baselines that do not train the base: frozen features, demonstrations in the context, a prompt alone.

baseline.py    the contract: hyper-parameters, fitting, answering
features.py    the base's embeddings as input of logistic regression, random forest or XGBoost
in_context.py  demonstrations in front of every prompt
prompt_text.py an instruction without demonstrations
selecting.py   which rows become demonstrations
embedding.py   pooled hidden states
forest.py      a forest as plain arrays
artefact.py    a fitted baseline as JSON and safetensors
running.py     `run`: configuration → fitted baseline in a folder, like `inlay.train.run`
scoring.py     evaluating a fitted baseline, with the same metrics as adapters

Names are imported when first used, so that the command line can ask at no cost whether a name is a baseline's.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.baselines.baseline import Baseline

# Key → module and class, in the order of the methods table.
BUILT_IN = {
    "features": ("features", "Features"),
    "in-context": ("in_context", "InContext"),
    "prompt-text": ("prompt_text", "PromptText"),
}
FILE = "baseline.json"


def is_fitted(folder: str | Path) -> bool:
    """Whether a folder holds a fitted baseline."""
    return (Path(folder) / FILE).is_file()


def baselines() -> dict[str, type[Baseline]]:
    """Key → class, for every baseline."""
    return {key: getattr(import_module(f"inlay.baselines.{module}"), name) for key, (module, name) in BUILT_IN.items()}


def parse_settings(method: str, words: Sequence[str]) -> dict[str, Any]:
    """Parse ``["k=4"]`` to values of the types of the baseline's fields, as `inlay.train.hyper` does for methods."""
    from inlay.train.hyper import parse_fields

    return parse_fields(baselines()[method], words, heading=f"--set, method {method!r}", noun="hyper-parameter")
