"""Regenerate the tables in README.md from the registry.

    python scripts/generate_docs.py            # rewrites what has changed
    python scripts/generate_docs.py --check    # exit code 1 where a file is out of date

A table stands between `<!-- NAME:start ... -->` and `<!-- NAME:end -->`. Whether a method merges is not
claimed but tried, on a tiny GPT-2, which has every kind of parameter.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import inlay
from inlay.core.delta import DeltaMethod
from inlay.core.errors import UnsupportedError
from inlay.core.method import Method
from inlay.core.prompt import PromptMethod
from inlay.core.subset import SubsetMethod
from inlay.testing.models import ZOO

ROOT = Path(__file__).parents[1]
CONTRACTS = {DeltaMethod: "delta", PromptMethod: "prompt", SubsetMethod: "subset"}


def method_table() -> str:
    """A row a method: what it is, where it comes from, what it can do."""
    header = (
        "`--method`",
        "class",
        "what it trains",
        "family",
        "paper",
        "contract",
        "merges",
        "mixed batches",
    )
    rows = [header, ("---",) * len(header)]
    for key, cls in inlay.methods().items():
        contract = next(word for parent, word in CONTRACTS.items() if issubclass(cls, parent))
        rows.append(
            (
                f"[`{key}`]({source_of(cls)})",
                f"`{cls.__name__}`",
                (inspect.getdoc(cls) or "").splitlines()[0].removesuffix(" No hyper-parameters.").rstrip("."),
                cls.family,
                linked(cls.paper),
                contract,
                "yes" if merges(cls) else "no",
                # A subset changes the weights for every row.
                "no" if contract == "subset" else "yes",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def source_of(cls: type[Method]) -> str:
    return Path(inspect.getfile(cls)).relative_to(ROOT).as_posix()


def linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", paper)


def merges(cls: type[Method]) -> bool:
    model = ZOO["gpt2"].build()
    inlay.attach(model, cls.examples()[0], name="tried")
    try:
        inlay.merge(model, "tried")
    except UnsupportedError:
        return False
    return True


TABLES: dict[str, Callable[[], str]] = {"methods": method_table}
FILES = ("README.md",)


def regenerated(text: str) -> str:
    """The text of a file with every table between its markers made anew."""
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
    for file in FILES:
        path = ROOT / file
        old = path.read_text(encoding="utf-8")
        new = regenerated(old)
        if new != old:
            stale.append(file)
            if not check:
                path.write_text(new, encoding="utf-8")
    for file in stale:
        print(f"{file} is out of date; run `make docs`" if check else f"{file} rewritten")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
