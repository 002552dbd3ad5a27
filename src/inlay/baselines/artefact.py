"""Storing a fitted baseline in a folder, without code that would run when it is read.

baseline.json             settings, facts (the demonstrations), the base's fingerprint
baseline.safetensors      numbers: weights, trees as arrays, embeddings of demonstrations
xgboost.json              XGBoost's own format, if it is the classifier
training.json, README.md  as beside an adapter
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from inlay.baselines import FILE, baselines
from inlay.baselines.baseline import Baseline, Fitted
from inlay.core.errors import AdapterFileError, BaseMismatchError, ConfigError, nearest, problems
from inlay.core.model.fingerprint import Fingerprint, fingerprint

FORMAT = 1
TENSORS = "baseline.safetensors"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A fitted baseline and the base it was fitted on."""

    baseline: Baseline
    fitted: Fitted
    base: Fingerprint

    def check(self, model: Any) -> None:
        """Raises: BaseMismatchError: the model is another base."""
        differences = self.base.differences(fingerprint(self.baseline.seen(model)))
        if differences:
            heading = f"this {self.baseline.name} baseline was fitted on another base; load the one it belongs to"
            raise BaseMismatchError(problems(heading, differences))


def write(folder: Path, baseline: Baseline, fitted: Fitted, model: Any) -> None:
    """Write to a folder, which is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "format": FORMAT,
        "settings": baseline.to_dict(),
        "base": fingerprint(baseline.seen(model)).to_dict(),
        "facts": fitted.facts,
        "texts": list(fitted.texts),
        "parameters": fitted.parameters,
    }
    (folder / FILE).write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if fitted.tensors:
        save_file({n: t.contiguous() for n, t in fitted.tensors.items()}, folder / TENSORS)
    for name, text in fitted.texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def read(folder: str | Path) -> Stored:
    """Read a stored baseline.

    Raises:
        AdapterFileError: it is incomplete, or was not written by inlay.
    """
    root = Path(folder)
    try:
        values = json.loads((root / FILE).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, expected {FORMAT}")
        baseline = build(str(values["settings"]["method"]), values["settings"])
        names = [str(name) for name in values["texts"]]
        if any(name != Path(name).name for name in names):
            raise ValueError("it names files outside its folder")
        fitted = Fitted(
            tensors=load_file(root / TENSORS) if (root / TENSORS).is_file() else {},
            facts=dict(values["facts"]),
            texts={name: (root / name).read_text(encoding="utf-8") for name in names},
            parameters=int(values["parameters"]),
        )
        return Stored(baseline=baseline, fitted=fitted, base=Fingerprint.from_dict(values["base"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ConfigError) as error:
        raise AdapterFileError(f"{root}: not a complete baseline ({error}); copy it again") from error


def build(name: str, settings: Mapping[str, Any]) -> Baseline:
    """The baseline with this name and these settings.

    Raises:
        ConfigError: the name is unknown, or the settings do not fit.
    """
    known = baselines()
    if name not in known:
        raise ConfigError(f"unknown baseline {name!r}{nearest(name, known)}")
    return known[name].of({key: value for key, value in settings.items() if key != "method"})
