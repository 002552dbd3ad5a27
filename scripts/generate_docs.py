"""Regenerate the tables in README.md from the registry, those in docs/ from what was measured, and what is written in
whole from the code: the listing of the methods and the schema of a run.

    python scripts/generate_docs.py            # rewrites what has changed
    python scripts/generate_docs.py --check    # exit code 1 where a file is out of date

A table stands between `<!-- NAME:start ... -->` and `<!-- NAME:end -->`. Whether a method merges is not
claimed but tried, on a tiny GPT-2, which has every kind of parameter; likewise which quantised bases it works on.
Tried are bitsandbytes' formats, whose library every development machine has, so that the table is the same on all.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from method_listing import listing
from quality_tables import near_table, rates_table, scores_table
from speed_table import speed_table
from transformers import BertConfig, BertForSequenceClassification

import inlay
import inlay.bases  # registers the layer types that can be read
from inlay.baselines import baselines
from inlay.bases.loading import LIBRARIES
from inlay.bases.trial import refusal
from inlay.cli.methods import describe
from inlay.cli.schema import run_schema, written
from inlay.core.build import build
from inlay.core.contracts.method import Method, SubsetMethod
from inlay.core.errors import ConfigError, SelectionError, UnsupportedError
from inlay.core.model.select import Places
from inlay.formats.peft import WRITERS
from inlay.methods import built_in
from inlay.methods._row import declared
from inlay.testing.laws.scaffold import put
from inlay.testing.models import ZOO
from inlay.train import load_base
from inlay.train.options import described

ROOT = Path(__file__).parents[1]
TRIED = [name for name, library in LIBRARIES.items() if library == "bitsandbytes"]
BASES_LEGEND = f"""\
Quantised bases: tried on {", ".join(TRIED)} (bitsandbytes). *yes*: it trains beside the packed weights, which do
not change. *from files*: yes, if the folder from which the base was quantised still exists. *no*: it trains the base's
own weights, which are packed. If torchao is installed, the laws check its int8 and int4 as well, and
`inlay methods --json` tries each format that your machine has."""


def method_table() -> str:
    """A row a method and a baseline: what it is, where it comes from, what it costs, what it can do."""
    header = (
        "`--method`", "class", "what it trains", "family", "paper", "trained on BERT-base", "merges", "mixed batches",
        "quantised bases", "PEFT's files",
    )  # fmt: skip
    rows = [header, ("---",) * len(header)]
    rows += [method_row(key, cls) for key, cls in inlay.methods().items() if key in built_in()]
    for key, baseline in baselines().items():
        name = f"[`{key}`]({source_of(baseline)})"
        rows.append((name, f"`{baseline.__name__}`", first_line(baseline), "baseline", "", "0", "no", "no", "–", "no"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{BASES_LEGEND}"


def method_row(key: str, cls: type[Method]) -> tuple[str, ...]:
    """The cells of one method."""
    return (
        f"[`{key}`]({source_of(cls)})",
        f"`{cls.__name__}`",
        first_line(cls),
        cls.family,
        linked(cls.paper),
        count(cls),
        yes(merges(cls)),
        yes(not issubclass(cls, SubsetMethod)),  # a subset changes the weights for every row
        quantised(cls),
        yes(key in WRITERS),
    )


def first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0].removesuffix(" No hyper-parameters.").rstrip(".")


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def quantised(cls: type[Method]) -> str:
    """Tried on each format: all of them, none, or which."""
    found = {name: on_quantised(cls.examples()[0], name) for name in TRIED}
    if len(set(found.values())) == 1:
        return found[TRIED[0]]
    return ", ".join(f"{name}: {said}" for name, said in found.items())


def on_quantised(method: Method, name: str) -> str:
    if find_spec(LIBRARIES[name]) is None:
        raise SystemExit(
            f"{LIBRARIES[name]} is not installed, so the table would claim what was not tried; `make setup`"
        )
    if refusal(method, name) is None:
        return "yes"
    return "from files" if refusal(method, name, files=True) is None else "no"


@cache
def bert_base() -> Any:
    """A model of BERT-base's shape, without its weights."""
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig())


def count(cls: type[Method]) -> str:
    """Numbers that the method trains at its defaults, where neither data nor the user's choice decides."""
    if cls.needs_data:
        return "–"
    try:
        adapter = build(bert_base(), cls(), name="counted", places=Places.of(None, None))
    except (ConfigError, SelectionError, UnsupportedError):
        return "–"
    return f"{adapter.count:,}"


def source_of(cls: type) -> str:
    return f"src/{cls.__module__.replace('.', '/')}.py"


def linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", paper)


def merges(cls: type[Method]) -> bool:
    """Tried and not claimed, on a tiny GPT-2, which has every kind of parameter."""
    specimen = ZOO["gpt2"]
    model = specimen.build()
    put(specimen, model, cls.examples()[0], "tried")
    try:
        inlay.merge(model, "tried")
    except UnsupportedError:
        return False
    return True


def option_table() -> str:
    """A row an option of a run, as its file spells it; the command line has dashes."""
    rows = [("option", "what it does", "where nothing is said"), ("---",) * 3]
    for option in described(run_schema()).values():
        choices = f" One of {', '.join(f'`{word}`' for word in option.choices)}." if option.choices else ""
        unsaid = f"`{option.unsaid}`" if option.default not in (None, [], {}) and option.unsaid else option.unsaid
        rows.append((f"`{option.name}`", f"{option.told}{choices}", unsaid))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


TABLES: dict[str, Callable[[], str]] = {
    "methods": method_table, "quality": scores_table, "near": near_table, "rates": rates_table,
    "speed": speed_table, "options": option_table,
}  # fmt: skip
PAGES = ("README.md", "docs/quality.md", "docs/speed.md", "docs/training.md")


def counted() -> str:
    """What `inlay methods` shows of the embedded base."""
    rows = describe(load_base(None, precision="stored").model)
    return f"{written({'declared': declared(), 'rows': rows})}\n"


WHOLE: dict[str, Callable[[], str]] = {
    "src/inlay/cli/methods.json": counted,
    "src/inlay/methods/_table.py": listing,
    "src/inlay/train/run.schema.json": lambda: f"{written(run_schema())}\n",
}


def regenerated(file: str) -> str:
    """The text of a page with every table between its markers made anew."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for name, table in TABLES.items():
        block = re.compile(rf"(<!-- {name}:start[^\n]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if block.search(text):
            made = table()
            text = block.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is out of date")
    check = parser.parse_args().check
    stale = []
    made = {file: partial(regenerated, file) for file in PAGES} | WHOLE
    for file, make in made.items():
        path = ROOT / file
        new = make()
        if not path.exists() or new != path.read_text(encoding="utf-8"):
            stale.append(file)
            if not check:
                path.write_text(new, encoding="utf-8")
    for file in stale:
        print(f"{file} is out of date; run `make docs`" if check else f"{file} rewritten")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
