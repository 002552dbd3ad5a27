"""A data set of the Hugging Face hub by its id, read through `datasets`' own cache."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict, config, load_dataset

from inlay.core.errors import DataError
from inlay.data.table import chosen_split, with_origins


def read_hub(source: str, split: str | None) -> Dataset:
    """Download (or take from the cache) one split of a hub data set.

    Args:
        source: ``owner/name`` or ``owner/name:config``.
        split: a split or a slice of one; `None` takes the only split, or ``train``.

    Raises:
        DataError: there is no such data set or split, or the hub cannot be reached and the cache does not have it.
    """
    name, _, configuration = source.partition(":")
    try:
        found: Any = load_dataset(name, configuration or None, split=split)
    except Exception as error:  # errors of datasets, requests and fsspec, and plain ValueErrors
        raise DataError(_why(source, split, error)) from error
    if isinstance(found, DatasetDict):
        split = chosen_split(list(found), None, source)
        found = found[split]
    return with_origins(found, f"{source}[{split}]")


def _why(source: str, split: str | None, error: Exception) -> str:
    what = f"{source!r} is not a local file, and could not be read as a data set of the hub"
    if config.HF_HUB_OFFLINE:
        return (
            f"{what}: offline mode is on (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE) and it is not in the cache. "
            "Give a local file, or download it once with offline mode off"
        )
    reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
    asked = f" with split={split!r}" if split else ""
    return f"{what}{asked}: {reason}. Check the spelling and the connection, or give a local file"
