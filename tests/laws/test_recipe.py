"""README's recipe: a new file among the methods, and nothing else, has all laws, a table row and the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from inlay.cli.main import main
from inlay.core.errors import ConfigError
from inlay.methods import built_in, method_named, registry
from inlay.methods._listed import listed
from inlay.testing import ZOO
from tests.recipe import readme_method

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "scripts"


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Puts a file of this name and content among the methods, as long as the test runs."""
    package: Any = import_module("inlay.methods")
    folder = tmp_path / "methods"
    folder.mkdir()

    def put(name: str, content: str) -> None:
        (folder / f"{name}.py").write_text(content, encoding="utf-8")
        registry.cache_clear()

    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield put
    registry.cache_clear()
    for path in folder.glob("*.py"):
        if sys.modules.pop(f"inlay.methods.{path.stem}", None) is not None:
            delattr(package, path.stem)


@pytest.fixture
def recipe(add: Callable[[str, str], None]) -> None:
    add("scale_shift", readme_method())


def cases() -> tuple[Callable[..., None], dict[str, Any]]:
    """The test of the laws, and what `make test` would run it on for the new method, by name."""
    laws = run_path(str(HERE / "test_laws.py"))
    return laws["test_laws"], {case.id: case for case in laws["CASES"] if case.values[0].name == "scale-shift"}


def test_every_law_on_every_model(recipe: None) -> None:
    law, found = cases()
    assert {f"scale-shift0-{name}" for name in ZOO} <= set(found)
    assert "scale-shift1-llama" in found
    for name in ("scale-shift0-gpt2", "scale-shift1-gpt2"):
        law(*found[name].values)


def test_the_laws_find_what_is_wrong_with_it(add: Callable[[str, str], None]) -> None:
    add("scale_shift", readme_method().replace("return weight * self.gain[:, None],", "return weight,"))
    law, found = cases()
    with pytest.raises(AssertionError, match="views_agree"):
        law(*found["scale-shift0-gpt2"].values)


def test_its_row_stands_in_its_family(recipe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    docs = import_module("generate_docs")
    row = docs.method_row("scale-shift", registry()["scale-shift"])
    assert row[:5] == (
        "[`scale-shift`](src/inlay/methods/scale_shift.py)",
        "`ScaleShift`",
        "A gain and an offset for each output",
        "rescaling",
        "[2210.08823](https://arxiv.org/abs/2210.08823)",
    )
    assert row[5:] == ("36,864", "yes", "yes", "yes", "no")  # a gain and an offset for query and value, 12 layers
    keys = list(registry())
    assert keys[keys.index("ia3") + 1] == "scale-shift"
    assert '"scale-shift": Row(' in import_module("method_listing").listing()


def test_the_command_line_trains_it(
    recipe: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], llama: Path, completions: Path
) -> None:
    words = ["--data", str(completions), "--base", str(llama), "--out", str(tmp_path / "out"), "--steps", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *words, "--method", "scale-shift", "--set", "shift=false", "--json"])
    told = capfd.readouterr()
    assert ended.value.code == 0, told.err
    with pytest.raises(SystemExit):
        main(["inspect", str(Path(json.loads(told.out)["adapter"])), "--json"])
    facts = json.loads(capfd.readouterr().out)
    assert (facts["method"], facts["hyper_parameters"]) == ("scale-shift", {"shift": False})
    with pytest.raises(ConfigError, match="did you mean 'scale-shift'"):
        method_named("scale-shfit")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("scale-shift", "VALUE = 1\n", "found: none"),
        ("other", None, r"found: ScaleShift \(name = 'scale-shift'\)"),
        ("scale-shift", "from inlay.methods.lora import LoRA\n", "found: none"),
    ],
)
def test_a_file_that_is_no_method_of_its_name(
    add: Callable[[str, str], None], name: str, content: str | None, said: str
) -> None:
    add(name.replace("-", "_"), readme_method() if content is None else content)
    with pytest.raises(ConfigError, match=rf"must define one subclass of Method with name = '{name}'.*{said}"):
        method_named(name)


def test_helpers_are_no_methods(add: Callable[[str, str], None]) -> None:
    add("_helper", "raise AssertionError('imported')\n")
    assert "-helper" not in built_in() and len(registry()) == len(built_in())


def test_rows_that_the_files_have_left_behind_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hyper-parameter that is new is not refused by what was written before it."""
    row = listed("lora")
    assert row is not None and row.cls == "LoRA" and row.settings["rank"] == ("int", 8)
    assert listed("no-such-method") is None
    monkeypatch.setattr("inlay.methods._listed.DECLARED", "earlier")
    assert listed("lora") is None
