"""A digest of a data set's content, to check when a run is resumed that it is still the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from inlay.data.parsed import ORIGIN

_BATCH = 1000


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the columns' names and all values in order, as 64 hex digits.

    Equal rows give equal digests, wherever they come from: file names, row numbers, chunks, index mappings and the
    order of the columns do not matter. Numbers are compared by type and value.
    """
    columns = sorted(name for name in dataset.column_names if name != ORIGIN)
    digest = hashlib.sha256(json.dumps([columns, len(dataset)]).encode())
    plain = dataset.with_format("arrow")
    for start in range(0, len(dataset), _BATCH):
        table: pa.Table = plain[start : start + _BATCH]
        for name in columns:
            _update(digest, table.column(name).combine_chunks())
    return digest.hexdigest()


def _update(digest: Any, column: Any) -> None:
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    kind = column.type
    if pa.types.is_list(kind) and pa.types.is_primitive(kind.value_type) and column.null_count == 0:
        lengths = np.diff(column.offsets.to_numpy())
        values = column.flatten()
        if values.null_count == 0:
            digest.update(lengths.astype("<i8").tobytes())
            digest.update(f"{kind.value_type}".encode() + values.to_numpy(zero_copy_only=False).tobytes())
            return
    digest.update(json.dumps(column.to_pylist(), ensure_ascii=True, default=str).encode())
