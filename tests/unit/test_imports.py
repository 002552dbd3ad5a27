"""Imports point one way, and importing inlay is light.

A room is a folder of `src/inlay` (or a module beside them). Its row below names the rooms it may import; an
import inside a function or under `TYPE_CHECKING` counts as well, because it is a dependency all the same.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import networkx
import pytest

import inlay
from inlay.methods import built_in

SOURCE = Path(inlay.__file__).parent
HEAVY = {"torch", "transformers", "datasets", "accelerate", "sklearn", "sacrebleu", "pandas"}

MIDDLE = {"core", "methods", "bases", "formats", "kernels"}
# The package itself, `import inlay`, is the public face of these rooms and counts as the room "inlay".
ALLOWED: dict[str, set[str]] = {
    "machine": set(),
    "core": {"machine"},
    "bases": {"core"},
    "kernels": {"core"},
    "formats": {"core", "methods", "assets"},  # a file names its method, whose class the registry knows, and its base
    "authoring": {"core"},  # what methods are written with
    "methods": {"authoring", "kernels"},
    "assets": {"core"},
    "arithmetic": {"core", "methods"},
    "data": {"core"},
    "sizes": set(),
    "plan": {"inlay", "machine", "sizes", *MIDDLE},
    "evaluate": {"inlay", "data", *MIDDLE},
    "train": {"inlay", "machine", "data", "evaluate", "plan", "assets", "sizes", *MIDDLE},
    "testing": {"inlay", *MIDDLE},
    "baselines": {"inlay", "machine", "data", "evaluate", "train", *MIDDLE},
    "cli": {
        "inlay",
        "machine",
        "train",
        "evaluate",
        "plan",
        "data",
        "assets",
        "demo",
        "arithmetic",
        "baselines",
        "sizes",
        *MIDDLE,
    },
    "demo": {"inlay", "train", "evaluate", "data", "assets", *MIDDLE},
    "inlay": {"arithmetic", *MIDDLE},
}
# Folders inside of rooms, each with what it may import of its own room: other folders, or files beside them ("errors").
# Whatever has no row there may import all of its room.
BOTTOM = {"core/errors", "core/labels", "core/upstream"}
INSIDE: dict[str, set[str]] = {
    "core/model": BOTTOM,
    "core/contracts": {*BOTTOM, "core/model"},
    "core/forward": {*BOTTOM, "core/model", "core/contracts"},
    "core/prompts": {*BOTTOM, "core/model", "core/contracts", "core/forward"},
}
# (file, room it imports) → why. An entry that is no longer needed fails.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("methods/__init__.py", "core"): "the registry finds methods by the core's class, and errors without torch",
}

# Beside the methods' classes, whose list follows from their files.
PUBLIC = {
    *("attach", "detach", "use", "adapters", "merge", "unmerge", "save", "load", "methods"),
    *("Adapter", "MergeReport", "InlayError", "UserError", "__version__"),
    *("combine", "CombineReport", "compile_layers", "fast_paths"),
}


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return "inlay" if first == "__init__.py" else first.removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    """The rooms that a file names in its imports."""
    package = ("inlay", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (above, node.module or "") if part)
            # `from inlay import core` names a room in its second half, `from inlay import LoRA` does not.
            # The version is a constant of the package, not a dependency on it.
            inner = [alias.name for alias in node.names if alias.name != "__version__"]
            names = [f"inlay.{name}" for name in inner] if origin == "inlay" else [origin]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "inlay":
                yield parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "inlay"


def crossings() -> set[tuple[str, str]]:
    """Every (file, room) with a file that imports another room."""
    return {
        (str(path.relative_to(SOURCE)), room)
        for path in sorted(SOURCE.rglob("*.py"))
        for room in imported_rooms(path)
        if room != room_of(path)
    }


def test_every_room_has_a_row() -> None:
    rooms = {room_of(path) for path in SOURCE.rglob("*.py")}
    assert rooms <= set(ALLOWED), "name the new room in ALLOWED, with the rooms it may import"


def test_rows_make_no_circle() -> None:
    remaining = {room: ALLOWED[room] - {room} for room in ALLOWED}
    while remaining:
        free = [room for room, needs in remaining.items() if not needs & set(remaining)]
        assert free, f"these rooms import each other: {sorted(remaining)}"
        for room in free:
            del remaining[room]


def test_imports_point_one_way() -> None:
    against = [
        f"src/inlay/{file} imports {room}"
        for file, room in sorted(crossings())
        if room not in ALLOWED[room_of(SOURCE / file)] and (file, room) not in EXCEPTIONS
    ]
    assert against == []


def test_imports_inside_a_room_point_one_way() -> None:
    against = [
        f"src/inlay/{file} imports {target}"
        for file, targets in sorted(files_imported().items())
        for folder, may in INSIDE.items()
        if file.startswith(f"{folder}/")
        for target in sorted(targets)
        if target.startswith(f"{folder.partition('/')[0]}/")
        and not any(target.startswith((f"{other}/", f"{other}.py")) for other in {folder, *may})
    ]
    assert against == []


def test_the_bottom_of_the_core_imports_nothing_of_it() -> None:
    imported = files_imported()
    core = {file: {t for t in imported[f"{file}.py"] if t.startswith("core/")} for file in sorted(BOTTOM)}
    assert {file: targets for file, targets in core.items() if targets - {"core/errors.py"}} == {}


def test_every_folder_of_the_core_has_a_row() -> None:
    folders = {f"core/{path.name}" for path in (SOURCE / "core").iterdir() if any(path.glob("*.py"))}
    assert folders == {folder for folder in INSIDE if folder.startswith("core/")}


def test_no_circle_of_more_than_two_files() -> None:
    graph = files_imported()
    found = [circle for circle in circles(graph) if len(circle) > 2]
    assert found == [], "these files import one another; imports in functions and under TYPE_CHECKING count"


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def files_imported() -> dict[str, set[str]]:
    """File → the files of `src/inlay` whose names it imports, wherever in it; a package is its ``__init__.py``."""
    return {
        str(path.relative_to(SOURCE)): {
            target for name in imported_names(path) if (target := file_of(name)) is not None
        }
        - {str(path.relative_to(SOURCE))}
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "__init__.py" or path.parent != SOURCE  # the public face imports everything
    }


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names below `inlay` that a file imports; in ``from inlay.core import x``, x may be a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(name: str) -> str | None:
    """The file that a dotted name stands for, or that defines it."""
    parts = name.split(".")
    if parts[0] != "inlay":
        return None
    for end in range(len(parts), 1, -1):
        path = SOURCE.joinpath(*parts[1:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return str(file.relative_to(SOURCE))
    return None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of two files or more that all import one another, directly or through the others."""
    found = networkx.strongly_connected_components(networkx.DiGraph(graph))
    return sorted(sorted(members) for members in found if len(members) > 1)


def test_exceptions_are_still_needed() -> None:
    assert set(EXCEPTIONS) <= crossings()


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import torch", []),
        ("import inlay", ["inlay"]),
        ("from inlay import LoRA", ["inlay"]),
        ("from inlay import core, train", ["core", "train"]),
        ("from inlay import __version__", []),
        ("import inlay.methods.lora", ["methods"]),
        ("from ..data import rows", ["data"]),
        ("from . import other", ["cli"]),
        ("def f():\n    from inlay.plan.memory import peak", ["plan"]),
    ],
)
def test_the_reader_of_imports(source: str, rooms: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_kwargs: source)
    assert list(imported_rooms(SOURCE / "cli" / "some.py")) == rooms


def test_public_names_are_pinned() -> None:
    classes = {cls.__name__: cls for key, cls in inlay.methods().items() if key in built_in()}
    assert set(inlay.__all__) == PUBLIC | set(classes)
    assert [name for name in sorted(PUBLIC) if not hasattr(inlay, name)] == []
    assert {name: getattr(inlay, name) for name in classes} == classes


@pytest.mark.parametrize("package", ["inlay", "inlay.data", "inlay.train"])
def test_type_checkers_see_what_is_loaded_when_used(package: str) -> None:
    """A package that imports its names when they are used says them twice: for Python, and for type checkers."""
    module: Any = import_module(package)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    found = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.name: str(node.module) for node in found for alias in node.names if alias.name != "*"}
    typed.pop("methods", None)
    assert set(typed) == {name for name, home in module._HOMES.items() if not home.startswith("inlay.methods.")}
    assert set(typed) <= set(module.__all__)
    for name, home in typed.items():
        assert getattr(import_module(home), name) is getattr(module, name)


@pytest.mark.parametrize("earlier", ["", "import inlay.methods; ", "from inlay.methods import registry; "])
def test_methods_is_callable_whatever_was_imported_before(earlier: str) -> None:
    answer = python(f"{earlier}import inlay; print(*inlay.methods())")
    assert answer.split()[:2] == ["lora", "dora"]


def test_importing_inlay_is_light() -> None:
    assert loaded_by("import inlay, inlay.core.errors") == set()


def test_help_is_light() -> None:
    run = "import sys; sys.argv = ['inlay', '--help']\ntry:\n    from inlay.cli.main import main; main()"
    assert loaded_by(f"{run}\nexcept SystemExit as end:\n    assert not end.code, end.code") == set()


@pytest.mark.parametrize("adapter", ["native/lora", "peft/lora", "adapterhub/lora"])
def test_inspecting_is_light(adapter: str) -> None:
    path = Path(__file__).parents[1] / "formats" / "golden" / adapter
    run = (
        f"import sys; sys.argv = ['inlay', 'inspect', {str(path)!r}]\ntry:\n    from inlay.cli.main import main; main()"
    )
    assert loaded_by(f"{run}\nexcept SystemExit as end:\n    assert not end.code, end.code") == set()


def test_the_list_of_methods_is_light() -> None:
    run = "import sys; sys.argv = ['inlay', 'methods']\ntry:\n    from inlay.cli.main import main; main()"
    assert loaded_by(f"{run}\nexcept SystemExit as end:\n    assert not end.code, end.code") == set()


def loaded_by(code: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has imported after running `code`."""
    report = f"\nimport sys\nprint('loaded:', *sorted({HEAVY!r} & set(sys.modules)))"
    return set(python(code + report).splitlines()[-1].split()[1:])


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
