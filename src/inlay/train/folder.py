"""The output folder of a run: locking, its files, and full disks.

    <out>/run.yaml              the resolved configuration; a run from it reproduces this one
    <out>/metrics.jsonl         one line per step and per evaluation
    <out>/checkpoints/          only while the run is unfinished
    <out>/adapter/              adapter.safetensors, training.json, README.md
    <out>/result.json           written last: the run is finished
    <out>/.replaced/            a finished run that --overwrite replaces, until the new one is finished

Everything is written under another name and then renamed, so that a kill at any moment leaves complete files.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from inlay.core.errors import OutputError

_OWN = (
    "result.json",
    "adapter",
    "checkpoints",
    "runs",
    "metrics.jsonl",
    "run.yaml",
)  # removed in this order
_UNFINISHED = tuple(f".{name}.part" for name in _OWN)  # what a kill during `write_beside` leaves
_PREFIX = "checkpoint-"
_REMEDY = "Complete files are kept: free space, then continue with --resume, or choose another --out"
_SAID = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be too large",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
}
_FULL_WORDS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "PytorchStreamWriter",
    "unexpected pos",
    "file write failed",
)


class RunFolder:
    """The paths of one run, and the state of the run according to them."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.config = self.root / "run.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.result = self.root / "result.json"
        self.adapter = self.root / "adapter"
        self.checkpoints = self.root / "checkpoints"
        self.best = self.checkpoints / "best.safetensors"
        self.replaced = self.root / ".replaced"

    @property
    def used(self) -> bool:
        """Whether the folder has files that are in the way of a new run."""
        return self.root.exists() and (not self.root.is_dir() or any(e.name != ".lock" for e in self.root.iterdir()))

    @property
    def finished(self) -> bool:
        return self.result.is_file()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Check whether a run may write here, without changing anything.

        Raises:
            OutputError: the folder is in use, or there is no run to resume or to overwrite.
        """
        with disk_errors(self.root):
            there = self.root.exists()
        if there and not self.root.is_dir():
            raise OutputError(f"{self.root} is a file; give a folder for --out")
        if resume and not self.config.is_file():
            raise OutputError(f"{self.root} holds no run to resume (no run.yaml). Leave --resume out to start one")
        if not self.used or resume:
            return
        if overwrite:
            own = (".lock", self.replaced.name, *_OWN, *_UNFINISHED)
            foreign = sorted(e.name for e in self.root.iterdir() if e.name not in own)
            if foreign or not any(path.exists() for path in (self.config, self.result, self.replaced)):
                shown = ", ".join(foreign[:5]) or "no run.yaml"
                raise OutputError(
                    f"{self.root} is not only a run of inlay ({shown}), so it is not overwritten. Choose another --out"
                )
            return
        begun = self.config.is_file() or self.replaced.is_dir()
        state = "a finished run" if self.finished else "an unfinished run" if begun else "other files"
        remedy = {
            "a finished run": "Choose another --out, or --overwrite to train again",
            "an unfinished run": "Give --resume to continue, --overwrite to start again, or another --out",
            "other files": "Choose another --out",
        }[state]
        raise OutputError(
            f"the output folder {self.root} is already in use: it holds {state}. {remedy}"
            + ("" if "--resume" in remedy else " (--resume continues an unfinished run; --overwrite replaces a run)")
            + (f". The finished run it would have replaced is in {self.replaced}" if self.replaced.is_dir() else "")
        )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the folder for this process. A second run in it is refused; a killed run leaves no lock behind.

        If the run fails before its first checkpoint, the finished run that it would have replaced is restored.
        """
        made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        lock = self._lock()
        try:
            yield
        finally:
            if self.replaced.is_dir() and not self.finished and self.last_checkpoint() is None:
                with suppress(OSError, OutputError):
                    self.restore()  # there is nothing to resume
            with suppress(OSError):
                (self.root / ".lock").unlink(missing_ok=True)
            lock.close()
            with suppress(OSError):  # a refused run leaves no folders behind; folders that are not empty stay
                for path in made:
                    path.rmdir()

    def _lock(self) -> IO[str]:
        """Lock a file in the folder. A run that ends removes it; a lock on a removed file does not count."""
        import fcntl  # Windows has no such lock; inlay does not run there yet

        path = self.root / ".lock"
        while True:
            with disk_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                lock = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.close()
                raise OutputError(
                    f"the output folder {self.root} is already in use: another process is training in it. "
                    "Wait until it ends (then --resume or --overwrite), or choose another --out"
                ) from error
            except OSError:
                pass  # a file system without locks, as on some clusters: a second run cannot be refused
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    return lock
            lock.close()

    def make_room(self) -> None:
        """Move a finished run aside until `finish`; remove an unfinished one.

        The file that marks a run as finished is moved last, so that a process killed in between can do it again.
        """
        if not self.finished:
            self._clear()
            return
        for name in _UNFINISHED:
            _remove(self.root / name)
        with disk_errors(self.replaced):
            if (self.replaced / self.result.name).exists():  # the new run was killed while finishing
                _remove(self.replaced)
            self._move(self.root, self.replaced)

    def restore(self) -> None:
        """Restore the finished run that `make_room` moved aside."""
        self._clear()
        if self.replaced.is_dir():
            with disk_errors(self.root):
                self._move(self.replaced, self.root)
                self.replaced.rmdir()

    def finish(self, result: str) -> None:
        """Write the result, and remove what only an unfinished run needs."""
        write_text(self.result, result)
        for path in (self.checkpoints, self.replaced):
            _remove(path)

    def _move(self, source: Path, target: Path) -> None:
        target.mkdir(exist_ok=True)
        for path in (source / name for name in reversed(_OWN)):
            if path.exists():
                os.replace(path, target / path.name)

    def _clear(self) -> None:
        """Remove a run's files; the one that marks the folder as a run goes last."""
        for path in (self.root / name for name in (*_UNFINISHED, *_OWN)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
                continue
            with disk_errors(path):
                path.unlink(missing_ok=True)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{_PREFIX}{step}"

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint. Incomplete ones, which a kill leaves under another name, are removed."""
        if not self.checkpoints.is_dir():
            return None
        for entry in self.checkpoints.glob(".*"):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        found = [e for e in self.checkpoints.glob(f"{_PREFIX}*") if e.name.removeprefix(_PREFIX).isdigit()]
        return max(found, key=lambda e: int(e.name.removeprefix(_PREFIX)), default=None)

    def keep_only(self, kept: Path) -> None:
        """Remove all checkpoints but one."""
        for entry in self.checkpoints.glob(f"{_PREFIX}*"):
            if entry != kept:
                shutil.rmtree(entry, ignore_errors=True)

    def keep_metrics(self, last_step: int) -> list[dict[str, Any]]:
        """Drop the lines of metrics.jsonl after `last_step`, because these steps will be repeated; return the rest."""
        if not self.metrics.is_file():
            return []
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                continue
            if entry["step"] <= last_step:
                kept.append(entry)
        write_text(self.metrics, "".join(json.dumps(entry) + "\n" for entry in kept))
        return kept


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of full disks and missing permissions into an `OutputError` that names the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = _why(error)
        if why is None:
            raise
        raise OutputError(f"{path} cannot be written: {why}. {_REMEDY}") from error
    except Exception as error:  # safetensors has its own error class
        if type(error).__name__ != "SafetensorError":
            raise
        raise OutputError(f"{path} cannot be written: {_why(error) or error}. {_REMEDY}") from error


def _why(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _SAID:
        return _SAID[error.errno]
    if any(word in str(error) for word in _FULL_WORDS):
        return "the disk is full" if "too large" not in str(error) else "the file would be too large"
    if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError)):
        return str(error.strerror).lower()
    return None


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or folder beside `path`, then rename it to `path`; a failure leaves nothing behind."""
    part = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        try:
            write(part)
            if part.is_dir() and path.is_dir():
                _remove(path)
            os.replace(part, path)
        except BaseException:
            _remove(part)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    write_beside(path, lambda part: part.write_text(text, encoding="utf-8"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
