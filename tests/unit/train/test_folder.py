"""The output folder: who may use it, whole files, full disks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from inlay.core.errors import OutputError
from inlay.train.folder import RunFolder, disk_errors, write_beside, write_text


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")

    def half(part: Path) -> None:
        part.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"result\.json cannot be written: the disk is full"):
        write_beside(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
    ],
)
def test_what_libraries_say_of_a_full_disk(error: Exception) -> None:
    with pytest.raises(OutputError, match="out cannot be written"), disk_errors(Path("out")):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(Path("out")):
        raise RuntimeError("shapes differ")


def test_use(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.check(resume=False, overwrite=False)
    with pytest.raises(OutputError, match="no run to resume"):
        folder.check(resume=True, overwrite=False)
    write_text(folder.config, "data: x\n")
    with pytest.raises(OutputError, match=r"an unfinished run.*--resume.*--overwrite"):
        folder.check(resume=False, overwrite=False)
    write_text(folder.result, "{}")
    with pytest.raises(OutputError, match=r"a finished run.*--overwrite"):
        folder.check(resume=False, overwrite=False)
    folder.check(resume=False, overwrite=True)
    (folder.root / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        folder.check(resume=False, overwrite=True)


def test_a_folder_of_somebody_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="Choose another"):
            RunFolder(tmp_path).check(resume=False, overwrite=overwrite)


def test_two_runs_at_once(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).claimed(),
        pytest.raises(OutputError, match="another process"),
        RunFolder(tmp_path).claimed(),
    ):
        pass
    with RunFolder(tmp_path).claimed():
        pass


def test_a_lock_that_an_ending_run_removes_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening and the locking of its file: without a second look, two runs would be in one folder."""
    held = fcntl.flock
    ended = iter([True])

    def locked(file: Any, how: int) -> None:
        if next(ended, False):
            (tmp_path / ".lock").unlink()
        held(file, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    with (
        RunFolder(tmp_path).claimed(),
        pytest.raises(OutputError, match="another process is training"),
        RunFolder(tmp_path).claimed(),
    ):
        pass


def test_a_file_system_without_locks_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with RunFolder(tmp_path / "run").claimed() as nothing:
        assert nothing is None


def test_what_a_kill_left_half_written_is_the_runs_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_text(folder.config, "data: x\n")
    (tmp_path / ".adapter.part").mkdir()
    (tmp_path / ".result.json.part").write_text("{")
    folder.check(resume=False, overwrite=True)
    folder.make_room()
    assert not list(tmp_path.iterdir())


def finished(root: Path, text: str) -> RunFolder:
    folder = RunFolder(root)
    write_text(folder.config, text)
    write_text(folder.adapter / "adapter.safetensors", text)
    folder.finish("{}")
    return folder


def contents(folder: RunFolder) -> dict[str, str]:
    files = (path for path in sorted(folder.root.rglob("*")) if path.is_file())
    return {path.relative_to(folder.root).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_a_replaced_run_is_kept_until_the_new_one_is_finished(tmp_path: Path) -> None:
    folder = finished(tmp_path, "old")
    folder.make_room()
    write_text(folder.config, "new")
    assert not folder.finished
    folder.check(resume=False, overwrite=True)
    with pytest.raises(OutputError, match=r"an unfinished run.*would have replaced is in .*\.replaced"):
        folder.check(resume=False, overwrite=False)
    folder.make_room()  # the next one replaces the finished run, too
    assert contents(folder)[".replaced/adapter/adapter.safetensors"] == "old"
    write_text(folder.config, "newer")
    folder.finish("{}")
    assert contents(folder) == {"run.yaml": "newer", "result.json": "{}"}


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_fails_gives_back_what_it_was_to_replace(tmp_path: Path, saved: bool) -> None:
    folder = finished(tmp_path, "old")
    before = contents(folder)
    with pytest.raises(OutputError), folder.claimed():
        folder.make_room()
        write_text(folder.config, "new")
        if saved:
            write_text(folder.checkpoint(1) / "adapter.safetensors", "new")
        raise OutputError("the disk is full")
    if not saved:
        assert contents(folder) == before
    else:
        assert folder.replaced.is_dir() and contents(folder)["run.yaml"] == "new"
        folder.restore()
        assert contents(folder) == before


@pytest.mark.parametrize("moves", range(4))
def test_a_run_that_is_half_replaced_can_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """A kill in the middle of `make_room` loses nothing of the finished run."""
    folder = finished(tmp_path, "old")
    before = contents(folder)
    left, move = [None] * moves, os.replace

    def killed(source: Path, target: Path) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        try:
            folder.make_room()
        except KeyboardInterrupt:
            assert moves < 3
    folder.check(resume=False, overwrite=True)
    folder.make_room()
    folder.restore()
    assert contents(folder) == before


def test_a_run_that_is_half_removed_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while an unfinished run is removed leaves one that can be overwritten."""
    folder = RunFolder(tmp_path)
    for path in (folder.config, folder.metrics):
        write_text(path, "{}")
    folder.checkpoints.mkdir()

    def killed(path: Path, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.make_room()
    folder.check(resume=False, overwrite=True)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the name is too long"):
        RunFolder(tmp_path / ("x" * 300)).check(resume=False, overwrite=False)


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError), RunFolder(tmp_path / "a" / "b").claimed():
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_checkpoints_a_kill_left_unfinished_are_not_taken(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11.part"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert folder.last_checkpoint() == folder.checkpoints / "checkpoint-10"
    assert not (folder.checkpoints / ".checkpoint-11.part").exists()


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 5)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    assert [entry["step"] for entry in folder.keep_metrics(3)] == [1, 2, 3]
    assert folder.metrics.read_text() == "\n".join(lines[:3]) + "\n"
