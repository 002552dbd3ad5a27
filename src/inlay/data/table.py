"""Reading a data file, or a data set from the hub, into rows that remember where they come from."""

from __future__ import annotations

import codecs
import difflib
import gzip
import io
import os
import re
import uuid
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from inlay.core.errors import DataError
from inlay.data.delimited import parse_delimited
from inlay.data.findings import Findings
from inlay.data.jsonrows import parse_json, parse_jsonl
from inlay.data.parsed import ORIGIN, Parsed, places, to_dataset
from inlay.data.reading import FORMATS, Reading, format_of

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_DEFAULT = Reading()


def read_table(source: str | os.PathLike[str], *, split: str | None = None, reading: Reading = _DEFAULT) -> Dataset:
    """Read all of a data file or a data set of the Hugging Face hub into memory.

    Args:
        source: a local file (CSV, TSV, JSON Lines, JSON, Parquet, plain text; each also ``.gz``), a folder
            written by `Dataset.save_to_disk`, or a hub id (``owner/name``, ``owner/name:config``).
        split: split of a hub data set, such as ``train`` or ``train[:1000]``. `None` takes the only one, or ``train``.
        reading: how a local file is read.

    Returns:
        The rows, with the column `ORIGIN` that names each row's file, row and line. Cells of CSV and TSV are
        always text. Nothing is written to a cache for local files.

    Raises:
        DataError: the source is missing, of unknown type, empty or malformed; one message lists all bad rows.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        dataset = _read_folder(path, split)
    elif path.is_file():
        if split is not None:
            raise DataError(f"{path}: a local file has no split {split!r}. Leave split out")
        dataset = _read_file(path, reading)
    elif isinstance(source, os.PathLike) or _means_a_file(str(source)):
        raise DataError(_missing(path))
    else:
        from inlay.data.hub import read_hub

        dataset = read_hub(str(source), split)
    if len(dataset) == 0:
        raise DataError(f"{source} is empty: it has no rows. Give a file with at least one row")
    return dataset


def _read_file(path: Path, reading: Reading) -> Dataset:
    kind = reading.format or format_of(path)
    name = str(path)
    if kind is None:
        raise DataError(
            f"{path}: unknown file type {''.join(path.suffixes[-2:]) or '(no suffix)'!r}. Known: "
            f"{', '.join(FORMATS)}, each also with .gz. Convert the file, or give its type with format="
        )
    raw = _unpacked(path)
    if not raw.strip():
        raise DataError(f"{path} is empty. Give a file with at least one row")
    if kind == "parquet":
        return _read_parquet(raw, path)
    return to_dataset(_parse(decoded(raw, name, reading.encoding), name, kind, reading), name)


def _parse(text: str, name: str, kind: str, reading: Reading) -> Parsed:
    match kind:
        case "csv" | "tsv":
            return parse_delimited(
                text,
                name,
                delimiter=reading.delimiter or ("," if kind == "csv" else "\t"),
                quoted=kind == "csv" if reading.quoted is None else reading.quoted,
                header=reading.header,
            )
        case "jsonl":
            return parse_jsonl(text, name)
        case "json":
            return parse_json(text, name)
    return _parse_text(text, reading.unit)


def _parse_text(text: str, unit: str) -> Parsed:
    if unit == "document":
        return Parsed({"text": [text]}, [1])
    rows: list[str] = []
    firsts: list[int | None] = []
    block: list[str] = []
    for number, raw in enumerate([*text.split("\n"), ""], start=1):
        line = raw.removesuffix("\r")
        if line.strip():
            block.append(line)
        if block and (unit == "line" or not line.strip()):
            firsts.append(number - len(block) + bool(line.strip()))
            rows.append("\n".join(block))
            block = []
    return Parsed({"text": rows}, firsts)


def _unpacked(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.name.endswith(".gz") else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}). Copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions") from error


def decoded(raw: bytes, name: str, encoding: str) -> str:
    """Decode bytes to text; a UTF-8 byte-order mark is dropped.

    Raises:
        DataError: bytes that are not valid in `encoding`, with their lines.
    """
    try:
        return raw.decode("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{name} looks like UTF-16, not {encoding}. Read it with encoding=utf-16") from error
        found = Findings(f"{name} is not {encoding} text")
        for number, line in enumerate(raw.split(b"\n"), start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as bad:
                found.add(
                    f"line {number}, byte {bad.start + 1} is 0x{line[bad.start]:02x}",
                    "Read it with its real encoding, often encoding=latin-1 or cp1252, or save it as UTF-8.",
                )
        found.raise_if_any()
        raise DataError(f"{name} is not {encoding} text: {error}. Read it with its real encoding=") from error


def _read_parquet(raw: bytes, path: Path) -> Dataset:
    try:
        table = pq.read_table(io.BytesIO(raw))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a complete Parquet file ({error}). Write or download it again") from error
    for place, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):  # pandas' categories, for which datasets has no type
            values = table.column(place).cast(column.type.value_type)
            table = table.set_column(place, column.name, values)
    return with_origins(Dataset(table), str(path))


def _read_folder(path: Path, split: str | None) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    if not any((path / mark).exists() for mark in ("dataset_info.json", "dataset_dict.json")):
        files = sorted(f.name for f in path.iterdir() if f.is_file() and format_of(f))
        inside = f"It contains {', '.join(files[:10])}: give one of them" if files else "It contains no data file"
        raise DataError(f"{path} is a folder, expected a file. {inside}")
    try:
        found: Any = load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is not a complete saved data set ({error}). Save it again") from error
    if isinstance(found, DatasetDict):
        if split is not None and split not in found:
            raise DataError(f"{path} has no split {split!r}. It has: {', '.join(found)} (whole splits only)")
        return with_origins(found[chosen_split(list(found), split, str(path))], str(path))
    if split is not None:
        raise DataError(f"{path} has no splits, but split={split!r} was asked for. Leave it out")
    return with_origins(found, str(path))


def chosen_split(splits: list[str], split: str | None, name: str) -> str:
    """The split to read: the one asked for, else the only one, else ``train``.

    Raises:
        DataError: there is no such split, or it is unclear which one is meant.
    """
    wanted = split or (splits[0] if len(splits) == 1 else "train")
    if wanted.split("[")[0].split("+")[0] in splits:
        return wanted
    asked = f"no split {split!r}" if split else "several splits and none is named 'train'"
    raise DataError(f"{name} has {asked}. Choose one with split=: {', '.join(splits)}")


def with_origins(dataset: Dataset, name: str) -> Dataset:
    """The data set with `ORIGIN` added: `name` and the row's number."""
    if ORIGIN in dataset.column_names:
        dataset = dataset.remove_columns(ORIGIN)
    rows = places(name, [None] * len(dataset))
    return dataset.add_column(ORIGIN, rows, new_fingerprint=uuid.uuid4().hex)  # else all rows are pickled for it


def _means_a_file(source: str) -> bool:
    path = Path(source)
    return (
        path.suffix.lower() in FORMATS
        or path.suffix == ".gz"
        or path.is_absolute()
        or source.startswith((".", "~"))
        or _HUB_ID.fullmatch(source) is None
    )


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such file; the folder {folder} does not exist. Check the path"
    there = sorted(f.name for f in folder.iterdir() if f.is_file() and format_of(f))
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.6)
    if close:
        return f"{path}: no such file. Did you mean {folder / close[0]}?"
    holds = f"{folder} contains {', '.join(there[:8])}" if there else f"{folder} contains no data files"
    return f"{path}: no such file. Check the path; {holds}"
