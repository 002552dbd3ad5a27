"""README and docs name only what exists, and their tables are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SOURCES = sorted(
    p for p in (ROOT / "src/inlay").iterdir() if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")
)
NAMED = re.compile(r"(?<![\w/.*<>-])(?:[\w-]+/)*[\w-]+\.(?:py|md)\b")
RECIPE = "src/inlay/methods/scale_shift.py"  # which the README has its reader write
WRITTEN_BY_INLAY = {"README.md"}  # the card beside an adapter


def test_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/generate_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_tree_in_the_readme_is_the_tree() -> None:
    block = re.search(r"## The tree.*?```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert block is not None
    missing, inside = [], ROOT
    for line in block[1].splitlines():
        path = line.split()[0]
        if not line.startswith(" "):
            inside = ROOT / path
            missing += [] if inside.exists() else [path]
        elif not (inside / path).exists():
            missing.append(f"{inside.relative_to(ROOT)}/{path}")
    assert missing == []


@pytest.mark.parametrize("room", SOURCES, ids=lambda room: room.name)
def test_paths_named_in_the_sources_exist(room: Path) -> None:
    """In messages, docstrings and comments: beside the file, in the package, or from the root of the repository."""
    dead = []
    for file in sorted(room.rglob("*.py")) if room.is_dir() else [room]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            for name in set(NAMED.findall(line)) - WRITTEN_BY_INLAY:
                if not any((place / name).is_file() for place in (file.parent, ROOT / "src/inlay", ROOT)):
                    dead.append(f"{file.relative_to(ROOT)}:{number}: {name}")
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_named_in_the_pages_exist(page: Path) -> None:
    """Between backticks, with or without the room in front."""
    places = [ROOT, *(path for path in (ROOT / "src/inlay", *(ROOT / "src/inlay").rglob("*")) if path.is_dir())]
    names = set(re.findall(rf"`({NAMED.pattern})`", page.read_text(encoding="utf-8"))) - WRITTEN_BY_INLAY - {RECIPE}
    assert {name for name in names if not any((place / name).is_file() for place in places)} == set()


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z]+)\b", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()
