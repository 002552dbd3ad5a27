"""The command line as a whole: fast help, exit codes, one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from inlay.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-c", "from inlay.cli.main import main; main()"]


def ended(*words: str) -> int:
    """The exit code of a command run in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["merge", "--help"], ["schema"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom inlay.cli.main import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'numpy', 'inlay.train.config'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: inlay" in done.stdout or json.loads(done.stdout)["title"] == "run.yaml of inlay train"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("--help") == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command}" in shown
        assert ended(command, "--help") == 0


def test_mistyped_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("trian") == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert ended("train", "--bach-size", "3") == 2
    assert "--batch-size" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import inlay

    assert ended("--version") == 0
    assert capsys.readouterr().out == f"inlay {inlay.__version__}\n"


def test_descriptions_are_whole(command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command("--help")
    shown = " ".join(out.split())
    assert code == 0 and "..." not in out.partition("Commands:")[2] and max(map(len, out.splitlines())) <= 80
    for name in COMMANDS:
        told = getattr(import_module(f"inlay.cli.{name}"), name).__doc__ or ""
        assert " ".join(told.split()) in shown
