"""PEFT's and AdapterHub's `adapter_config.json`, read strictly: keys are used, without effect, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inlay.core.errors import AdapterFileError

FILE = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT's
HUB_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")  # AdapterHub's

LARGEST = 16 * 2**20  # bytes of a configuration; a real one has a few thousand
MOST = 2**40  # no rank, length or block is larger; products of sizes must fit into 64 bits

# Keys that PEFT writes for its own use; none of them changes what an adapter computes.
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)


class Config:
    """The keys of one configuration, and the problems found in them.

    Attributes:
        task: number of the task to read, if the file has several.
        wrong: problems, collected for one error.
    """

    def __init__(self, values: dict[str, Any], path: Path, task: int | None = None) -> None:
        self.values, self.path, self.task = values, path, task
        self.wrong: list[str] = []
        self._known = set(WITHOUT_EFFECT)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; `default` if it is absent or null."""
        self._known.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.wrong.append(f"{key} is {value!r}, expected a number")
            return default
        return value

    def whole(self, key: str, default: int) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
            self.wrong.append(f"{key} is {value!r}, expected a positive whole number")
            return default
        return value

    def ignore(self, *keys: str) -> None:
        """Accept keys that say how the adapter was trained or initialised, not what it computes."""
        self._known.update(keys)

    def refuse(self, reason: str, *keys: str, unless: Iterable[Any] = ()) -> None:
        """Note a problem for each of these keys that is present and neither empty nor one of `unless`."""
        for key in keys:
            value = self.get(key)
            if value not in (None, False, [], {}, *unless):
                self.wrong.append(f"{key} is {value!r}: {reason}")

    def finish(self) -> None:
        """Note a problem for every key that nothing has asked for."""
        unknown = sorted(set(self.values) - self._known)
        self.wrong += [
            f"{key} is {self.values[key]!r}: inlay does not know this key, so it might change what the adapter computes"
            for key in unknown
            if self.values[key] not in (None, False, [], {})
        ]


def read_config(folder: Path) -> dict[str, Any]:
    """The keys of the configuration in `folder`.

    Raises:
        AdapterFileError: there is none, or it is not a JSON object.
    """
    path = folder / FILE
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: not a readable JSON file ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def is_pefts(folder: Path) -> bool:
    """Whether `folder` has an adapter in PEFT's format."""
    return (folder / FILE).is_file() and "peft_type" in read_config(folder)


def is_adapterhubs(folder: Path) -> bool:
    """Whether `folder` has an adapter in AdapterHub's format."""
    return (folder / FILE).is_file() and isinstance(read_config(folder).get("config"), dict)
