"""Several runs: one after another, or together, taking turns on one copy of the base.

    base (frozen, once) ─┬─ adapter a, optimizer a, rows a ── step ─┐
                         ├─ adapter b, optimizer b, rows b ── step ─┤  a turn is one optimizer step,
                         └─ adapter c, optimizer c, rows c ── step ─┘  with its evaluation and checkpoint

Each run gives the same bits as alone: it has the same code, seeds, batches, random numbers and folder. The runs share
the base's memory and loading, and the states of a trunk cache for rows that they have in common. Activations, the
larger part of a step's memory, exist for one run at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from inlay.core.errors import ConfigError, InlayError, OutputError, problems
from inlay.train.config import RunConfig
from inlay.train.folder import RunFolder
from inlay.train.quiet import quiet_libraries
from inlay.train.running import RunResult, check_identity, resumed_config, start_folder, train_prepared
from inlay.train.stop import Stopped, StopRequest, listening

Runner = Callable[..., Any]


def checked(runs: Sequence[Mapping[str, Any]], *, resume: bool) -> list[RunConfig]:
    """The configurations of several runs.

    Raises:
        ConfigError: something is wrong with one of them, or two write to the same folder.
    """
    found: list[RunConfig] = []
    for place, values in enumerate(runs, 1):
        if "out" not in values:
            raise ConfigError(f"run {place} of {len(runs)} has no out: give each run a folder to write to")
        begun = resume and RunFolder(str(values["out"])).config.is_file()
        found.append(
            resumed_config(str(values["out"]), dict(values))
            if begun
            else RunConfig.of(values, origin=f"run {place} of {len(runs)}")
        )
    folders = [str(Path(config.out).expanduser().resolve()) for config in found]
    twice = sorted({folder for folder in folders if folders.count(folder) > 1})
    if twice:
        raise ConfigError(f"several runs write to {', '.join(twice)}; give each run its own out")
    return found


def run_several(
    configs: Sequence[RunConfig],
    runner: Callable[[str], Runner],
    *,
    together: bool,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Any]:
    """Run them all. When they are resumed, a run that had not begun is started.

    Args:
        runner: runs a single configuration (`inlay.train.run`, or a baseline's).
    """
    if together:
        return list(run_together(configs, resume=resume, overwrite=overwrite))
    return [
        runner(config.method)(config, resume=resume and RunFolder(config.out).config.is_file(), overwrite=overwrite)
        for config in configs
    ]


def run_together(configs: Sequence[RunConfig], *, resume: bool = False, overwrite: bool = False) -> list[RunResult]:
    """Train several adapters on one copy of their base, in turns.

    Args:
        configs: runs with the same base, task, labels and precision; everything else may differ.
        resume: continue those that had begun.
        overwrite: replace runs in the folders.

    Raises:
        UserError: before they start, something is wrong with one of them; or, after all others have ended, one failed.
        Stopped: Ctrl-C or SIGTERM; every run has saved a checkpoint.
    """
    if any(config.compile for config in configs):
        raise ConfigError("compile cannot be combined with several runs at once: compiled layers serve one adapter")
    folders = [RunFolder(config.out) for config in configs]
    begun = [resume and folder.config.is_file() for folder in folders]
    for folder, again in zip(folders, begun, strict=True):
        folder.check(resume=again, overwrite=overwrite)
    done = {i: RunResult.read(f.result) for i, f in enumerate(folders) if begun[i] and f.finished}
    left = [i for i in range(len(configs)) if i not in done]
    with ExitStack() as stack:
        request = stack.enter_context(listening())
        for i in left:
            stack.enter_context(folders[i].claimed())
        stack.enter_context(quiet_libraries())
        found = _in_turns([configs[i] for i in left], [folders[i] for i in left], [begun[i] for i in left], request)
    return [done[i] if i in done else found[left.index(i)] for i in range(len(configs))]


def _in_turns(
    configs: list[RunConfig], folders: list[RunFolder], begun: list[bool], request: StopRequest
) -> list[RunResult]:
    from inlay.train.prepare import Prepared, prepare
    from inlay.train.turns import Ambient, Turns

    prepared: list[Prepared] = []
    ambient: list[Ambient] = []
    clean = Ambient.now()
    for config in configs:
        clean.restore()
        prepared.append(prepare(config, beside=prepared[0] if prepared else None))
        ambient.append(Ambient.now())
    for one, folder, again in zip(prepared, folders, begun, strict=True):
        check_identity(folder, one) if again else start_folder(folder, one)
    turns = Turns(ambient)
    ended: dict[int, RunResult | BaseException] = {}
    threads = [
        threading.Thread(target=_run, args=(i, prepared[i], folders[i], request, turns, ended), daemon=True)
        for i in range(len(configs))
    ]
    for thread in threads:
        thread.start()
    _wait(threads, request)
    return _results(configs, ended)


def _run(me: int, prepared: Any, folder: RunFolder, request: StopRequest, turns: Any, ended: dict[int, Any]) -> None:
    """The thread of a run: its whole training, one step per turn."""
    import inlay
    from inlay.train.callbacks import Turn

    turns.take(me)
    try:
        with inlay.use(prepared.base.model, prepared.adapter.name):
            turn = Turn(lambda: turns.pass_on(me))
            ended[me] = train_prepared(prepared, folder, request, progress=False, callbacks=[turn])
    except BaseException as error:  # reported when the other runs have ended
        ended[me] = error
    finally:
        turns.leave()


def _wait(threads: list[threading.Thread], request: StopRequest) -> None:
    """Wait until all runs have ended. The first signal lets each finish its step, a second ends them at once."""
    while any(thread.is_alive() for thread in threads):
        asked = request.number
        try:
            for thread in threads:
                thread.join()
        except Stopped:
            if asked:
                raise


def _results(configs: list[RunConfig], ended: dict[int, RunResult | BaseException]) -> list[RunResult]:
    errors = {i: e for i, e in ended.items() if isinstance(e, BaseException)}
    if not errors:
        return [r for _, r in sorted(ended.items()) if isinstance(r, RunResult)]
    first = next(iter(errors.values()))
    if not all(isinstance(error, InlayError) for error in errors.values()):
        raise next(error for error in errors.values() if not isinstance(error, InlayError))
    stopped = [error for error in errors.values() if isinstance(error, Stopped)]
    told = [f"{configs[i].out}: {error}" for i, error in sorted(errors.items())]
    if stopped:
        raise Stopped(problems("the runs were stopped", told), stopped[0].exit_code - 128)
    kind = type(first) if len({type(error) for error in errors.values()}) == 1 else OutputError
    raise kind(problems(f"{len(errors)} of {len(configs)} runs failed; the others are finished", told))
