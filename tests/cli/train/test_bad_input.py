"""Bad input to `inlay train`: exit code 2, one message that names the remedy, no traceback, nothing left behind."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from inlay.cli.main import main
from tests import tiny

ROOT = Path(__file__).parents[3]
RUN = [sys.executable, "-c", "from inlay.cli.main import main; main()"]
LONG = " ".join(tiny.WORDS * 12)


def refused(capfd: pytest.CaptureFixture[str], out: Path, *words: str) -> str:
    """What a refused command says, once it is certain that it did nothing else."""
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(SystemExit) as caught:
        main(["train", "--out", str(out), "--steps", "2", *words])
    told = capfd.readouterr()
    assert caught.value.code == 2, told.err
    assert told.out == ""
    assert told.err.count("error:") == 1 and "Traceback" not in told.err
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    return told.err


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


GOOD = {"prompt": "a cat", "completion": "A CAT"}
FILES: list[tuple[str, str, str, list[str]]] = [
    ("an unknown type", "rows.xlsx", "x", ["rows.xlsx", "unknown file type", ".csv"]),
    ("an empty file", "rows.jsonl", "", ["rows.jsonl is empty"]),
    ("a header only", "rows.csv", "prompt,completion\n", ["rows.csv"]),
    ("a missing column", "rows.csv", "prompt,answer\na,b\n", ["no column 'completion'", "answer"]),
    ("not JSON", "rows.jsonl", rows(GOOD) + "{oops\n", ["rows.jsonl", "2"]),
    ("wrong types", "rows.jsonl", rows(GOOD, {"prompt": "b", "completion": 3}), ["rows.jsonl", "2", "completion"]),
    (
        "a row too long",
        "rows.jsonl",
        rows(GOOD, {"prompt": LONG, "completion": "b"}),
        ["rows.jsonl", "2", "more than 96"],
    ),
    ("nothing scored", "rows.jsonl", rows(GOOD, {"prompt": "a", "completion": ""}), ["rows.jsonl", "2"]),
    ("one label", "rows.jsonl", rows({"text": "a", "label": "x"}, {"text": "b", "label": "x"}), ["label 'x'", "two"]),
]


@pytest.mark.parametrize(("name", "content", "said"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_files(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, name: str, content: str, said: list[str]
) -> None:
    (tmp_path / name).write_text(content)
    told = refused(capfd, tmp_path / "out", "--data", str(tmp_path / name), "--base", str(llama))
    for part in said:
        assert part in told


def test_a_completion_cut_away(capfd: pytest.CaptureFixture[str], tmp_path: Path, llama: Path) -> None:
    """Chats are cut at their end, where the only scored turn stands: other tools go on with a loss of NaN."""
    chat = {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "ok"}]}
    (tmp_path / "rows.jsonl").write_text(rows(chat))
    told = refused(
        capfd, tmp_path / "out", "--data", str(tmp_path / "rows.jsonl"), "--base", str(llama), "--on-long", "truncate"
    )
    assert "rows.jsonl" in told and "no token is left to score" in told


def test_a_label_never_seen(capfd: pytest.CaptureFixture[str], tmp_path: Path, bert: Path) -> None:
    data = tiny.jsonl(tmp_path / "rows.jsonl", "classification")
    (tmp_path / "held.jsonl").write_text(rows({"text": "a", "label": "yess"}))
    told = refused(
        capfd, tmp_path / "out", "--data", str(data), "--eval-data", str(tmp_path / "held.jsonl"), "--base", str(bert)
    )
    for part in ("held.jsonl", "'yess' was never seen in training", "did you mean 'yes'"):
        assert part in told


def test_a_gzip_cut_short(capfd: pytest.CaptureFixture[str], tmp_path: Path, llama: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows(*[GOOD] * 50).encode())[:-12])
    told = refused(capfd, tmp_path / "out", "--data", str(tmp_path / "rows.jsonl.gz"), "--base", str(llama))
    assert "rows.jsonl.gz" in told


OPTIONS: list[tuple[list[str], list[str]]] = [
    (["--method", "loar"], ["did you mean 'lora'"]),
    (["--set", "rnak=3", "--set", "alpha=x"], ["did you mean 'rank'", "alpha='x' is not a number"]),
    (["--where", "no_such_module,q_proj"], ["no_such_module"]),
    (["--modules-to-save", "no_such_head"], ["no_such_head"]),
    (["--columns", "promt=prompt"], ["did you mean 'prompt'"]),
    (["--columns", "prompt=nowhere"], ["nowhere"]),
    (["--task", "regresion"], ["regresion"]),
    (["--batch-size", "0", "--learning-rate", "-1"], ["batch_size is 0", "learning_rate is -1.0"]),
    (["--layers", "0-x"], ["0-x"]),
    (["--reading", "formt=csv"], ["did you mean 'format'"]),
    (["--split", "test"], ["has no split 'test'"]),
    (["--layers", "7"], ["7"]),
    (["--report-to", "nobody"], ["nobody"]),
    (["--max-length", "4000"], ["the base reads 96 tokens"]),
    (["--base", "./nowhere"], ["./nowhere", "no such folder"]),
    (["--resume", "--overwrite"], ["no run to resume"]),
    (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
]


@pytest.mark.parametrize(("words", "said"), OPTIONS, ids=[" ".join(case[0]) for case in OPTIONS])
def test_options(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    llama: Path,
    completions: Path,
    words: list[str],
    said: list[str],
) -> None:
    told = refused(capfd, tmp_path / "out", "--data", str(completions), "--base", str(llama), *words)
    for part in said:
        assert part in told


def test_what_must_be_given(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--data is missing" in refused(capfd, tmp_path / "out")
    with pytest.raises(SystemExit) as caught:
        main(["train", "--data", "x.jsonl"])
    assert caught.value.code == 2 and "--out is missing" in capfd.readouterr().err


def test_a_base_without_weights(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, completions: Path
) -> None:
    shutil.copytree(llama, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    told = refused(capfd, tmp_path / "out", "--data", str(completions), "--base", str(tmp_path / "base"))
    assert "no weights" in told and "Download" in told


def test_a_folder_in_use(capfd: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, completions: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    for words in ([], ["--overwrite"], ["--resume"]):
        told = refused(capfd, tmp_path / "out", "--data", str(completions), "--base", str(llama), *words)
        assert str(tmp_path / "out") in told
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def test_flags_override_the_file(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, completions: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {completions}\nbase: {llama}\nmethod: lora\nsettings: {{rank: 2}}\nsteps: 9\n")
    words = [
        "train",
        "--config",
        str(file),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "2",
        "--set",
        "alpha=3",
        "--json",
    ]
    with pytest.raises(SystemExit) as caught:
        main(words)
    told = capfd.readouterr()
    assert caught.value.code == 0, told.err
    result = json.loads(told.out)
    assert result["steps"] == 2
    from inlay.train import RunConfig

    saved = RunConfig.read(tmp_path / "out" / "run.yaml")
    assert (saved.settings["rank"], saved.settings["alpha"]) == (2, 3.0)


def _command(*words: str, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*RUN, "train", *words], capture_output=True, text=True, env=env, preexec_fn=before)


@pytest.mark.slow
def test_a_process_of_its_own(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    done = _command("--data", str(tmp_path / "rows.jsonl"), "--base", str(llama), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'rows.jsonl'} is empty. Give a file with at least one row"]


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, llama: Path, completions: Path) -> None:
    """Files may not grow beyond 20 kB, as on a disk that fills up; with room again the run goes on."""

    def small() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    words = ["--data", str(completions), "--base", str(llama), "--steps", "4", "--save-every", "2", "--set", "rank=64"]
    done = _command(*words, "--out", str(tmp_path / "out"), before=small)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert "cannot be written" in done.stderr and "--resume" in done.stderr
    left = [path.name for path in (tmp_path / "out").rglob("*")]
    assert not [name for name in left if name.endswith(".part") or name.startswith("checkpoint-")]
    again = _command("--out", str(tmp_path / "out"), "--resume")
    assert again.returncode == 0, again.stderr
