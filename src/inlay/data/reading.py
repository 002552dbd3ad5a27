"""How local files are read: the options, and the table of file types."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

from inlay.core.errors import ConfigError, nearest, problems

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
UNITS = ("line", "paragraph", "document")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options for reading a local file. The defaults suit most files.

    Attributes:
        format: ``csv``, ``tsv``, ``jsonl``, ``json``, ``parquet`` or ``text``; `None` takes it from the file's name.
            Every format may be compressed with gzip (``.gz``).
        encoding: encoding of text formats. A UTF-8 byte-order mark is dropped.
        delimiter: the character between cells; `None` is a comma in CSV and a tab in TSV.
        quoted: whether ``"`` quotes a cell. `None` is yes in CSV (RFC 4180: a quote inside is doubled, a quoted cell
            may contain line ends) and no in TSV, where a quote is an ordinary character and every line is a row.
        header: names of the columns, for a CSV or TSV file without a header row.
        unit: what one row of plain text is: a non-empty ``line``, a ``paragraph`` (lines between empty ones)
            or the ``document``.

    Raises:
        ConfigError: an option with an unknown value.
    """

    format: str | None = None
    encoding: str = "utf-8"
    delimiter: str | None = None
    quoted: bool | None = None
    header: tuple[str, ...] | None = None
    unit: str = "line"

    def __post_init__(self) -> None:
        found = []
        known = sorted(set(FORMATS.values()))
        if self.format is not None and self.format not in known:
            found.append(f"format={self.format!r} is unknown{nearest(self.format, known)}")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            found.append(f"encoding={self.encoding!r} is unknown; for example utf-8, utf-16 or latin-1")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '\r\n"'):
            found.append(f"delimiter={self.delimiter!r} must be one character, and no quote or line end")
        if self.unit not in UNITS:
            found.append(f"unit={self.unit!r} is unknown{nearest(self.unit, UNITS)}")
        if found:
            raise ConfigError(problems("reading options", found))

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from the defaults, as plain types."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}


def format_of(path: PurePath) -> str | None:
    """The format according to the file's name (``x.csv.gz`` is ``csv``), or `None`."""
    return FORMATS.get(PurePath(path.name.removesuffix(".gz")).suffix.lower())
