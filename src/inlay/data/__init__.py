"""Data: reading files, finding columns, labels, templates, encoding and batches.

    dataset = read_table("tickets.jsonl")
    layout = resolve_columns(dataset)
    rows = encode(dataset, layout, tokenizer, task="causal", max_length=512)
    batch = collate(tokenizer, "causal")([rows[0], rows[1]])

Names are imported when first used, so that the options (`Reading`, `Template`, `parse_columns`) are available
without loading `datasets` or torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.core.labels import IGNORED
    from inlay.data.collating import Collator, collate
    from inlay.data.columns import Kind, Layout, Task, parse_columns, resolve_columns
    from inlay.data.digest import fingerprint
    from inlay.data.encoding import encode
    from inlay.data.job import OnLong
    from inlay.data.labels import labels_of
    from inlay.data.parsed import ORIGIN, origins
    from inlay.data.prompting import Prompt, encode_prompt, prompts
    from inlay.data.reading import Reading
    from inlay.data.table import read_table
    from inlay.data.template import Template

_HOMES = {
    "Collator": "collating",
    "collate": "collating",
    "Kind": "columns",
    "Layout": "columns",
    "Task": "columns",
    "parse_columns": "columns",
    "resolve_columns": "columns",
    "fingerprint": "digest",
    "IGNORED": "job",
    "OnLong": "job",
    "encode": "encoding",
    "labels_of": "labels",
    "ORIGIN": "parsed",
    "origins": "parsed",
    "Prompt": "prompting",
    "encode_prompt": "prompting",
    "prompts": "prompting",
    "Reading": "reading",
    "read_table": "table",
    "Template": "template",
}

__all__ = [
    "IGNORED",
    "ORIGIN",
    "Collator",
    "Kind",
    "Layout",
    "OnLong",
    "Prompt",
    "Reading",
    "Task",
    "Template",
    "collate",
    "encode",
    "encode_prompt",
    "fingerprint",
    "labels_of",
    "origins",
    "parse_columns",
    "prompts",
    "read_table",
    "resolve_columns",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
