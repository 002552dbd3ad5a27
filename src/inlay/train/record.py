"""`training.json` beside an adapter: what evaluation and generation need to know about its training."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from inlay.core.errors import AdapterFileError
from inlay.formats.provenance import LOCAL, shareable
from inlay.train.folder import write_text

FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Facts of a finished or running training.

    Attributes:
        task: the task of the training.
        base: folder or hub id; None is the embedded base. The file has only the last name of a folder (`shareable`);
            `read_record` finds the whole path in the run's configuration, as long as the adapter is in the run's
            folder.
        labels: names of the classes in the order of the head's outputs.
        columns: role → column of the training data.
        kind: kind of the data: ``completion``, ``chat``, ``classification``, ``regression`` or ``text``.
        prompt_template, separator: how prompt and completion were joined.
        max_length: most tokens of a row.
        data: digests of the encoded rows, ``train`` and perhaps ``eval``.
        versions: versions of Python and the libraries.
        quantize: format of the base's weights; None if they were not quantised.
    """

    task: str
    base: str | None
    labels: tuple[str, ...] | None
    columns: dict[str, str]
    kind: str
    prompt_template: str
    separator: str
    max_length: int
    data: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    quantize: str | None = None

    def write(self, folder: Path) -> None:
        values = dataclasses.asdict(self) | {"base": None if self.base is None else shareable(self.base)}
        write_text(folder / FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_record(folder: str | Path) -> TrainingRecord | None:
    """The record beside an adapter; None if the adapter does not come from a training run.

    Raises:
        AdapterFileError: the record cannot be read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        labels, base = values.pop("labels"), values.pop("base")
        base = _in_full(base, Path(folder))
        return TrainingRecord(**values, base=base, labels=None if labels is None else tuple(labels))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterFileError(
            f"{path} is not a complete training record ({error}); copy it again, or remove it"
        ) from error


def _in_full(base: str | None, folder: Path) -> str | None:
    """The path of a base of which only the name was recorded, found in the configuration of the adapter's run."""
    if base is None or not base.startswith(LOCAL):
        return base
    try:
        named = yaml.safe_load((folder.resolve().parent / "run.yaml").read_text(encoding="utf-8"))["base"]
        return str(named) if shareable(named) == base else base
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return base  # the adapter is no longer in its run's folder


def versions() -> dict[str, str]:
    """The versions of inlay, Python and the libraries."""
    found = {name: metadata.version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
    from inlay import __version__

    return {"inlay": __version__, "python": platform.python_version(), **found}
