"""`training.json` beside an adapter: what evaluating and generating must know about its training."""

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
        task: what was trained.
        base: folder or hub id; None is the embedded base. In the file a folder has its last name only (`shareable`);
            `read_record` finds the whole path in the configuration of the run, while the adapter lies in its folder.
        labels: names of the classes in the order of the head's outputs.
        columns: role → column of the training data.
        kind: of the data: ``completion``, ``chat``, ``classification``, ``regression`` or ``text``.
        prompt_template, separator: how prompt and completion were joined.
        max_length: tokens a row could have.
        data: digests of the encoded rows, ``train`` and maybe ``eval``.
        versions: of Python and the libraries.
        quantize: format of the base's weights; None is as they are.
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
    """The record beside an adapter; None where the adapter was not made by a training run.

    Raises:
        AdapterFileError: a record that cannot be read.
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
            f"{path} is not a whole training record ({error}); copy it again, or remove it"
        ) from error


def _in_full(base: str | None, folder: Path) -> str | None:
    """The path of a base of which only the name was recorded, as the run around the adapter has it."""
    if base is None or not base.startswith(LOCAL):
        return base
    try:
        named = yaml.safe_load((folder.resolve().parent / "run.yaml").read_text(encoding="utf-8"))["base"]
        return str(named) if shareable(named) == base else base
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return base  # the adapter was taken out of its run's folder


def versions() -> dict[str, str]:
    """What the run ran with."""
    found = {name: metadata.version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
    from inlay import __version__

    return {"inlay": __version__, "python": platform.python_version(), **found}
