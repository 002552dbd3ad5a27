"""A training run from its configuration to the saved adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.core.errors import BaseMismatchError, ConfigError, DataError, OutputError, UnsupportedError, problems
from inlay.core.fast_paths import fast_paths
from inlay.train.config import RunConfig
from inlay.train.folder import RunFolder, write_beside, write_text
from inlay.train.foresight import foresee
from inlay.train.loading import own_precision
from inlay.train.prepare import Prepared, prepare
from inlay.train.quiet import quiet_libraries
from inlay.train.stop import Stopped, StopRequest, listening

if TYPE_CHECKING:
    from inlay.train.callbacks import Metrics, Progress
    from inlay.train.compiling import Compilation
    from inlay.train.trainer import AdapterTrainer
    from inlay.train.trunk import TrunkCache

IDENTITY = "identity.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run.

    Attributes:
        out: the run's folder.
        adapter: the adapter's folder.
        metrics: ``train_loss`` (mean over all steps) and the kept adapter's ``eval_`` scores.
        steps: number of steps that were run.
        best_step: the step after which the kept adapter was saved; None without evaluations.
        stopped_early: whether `early_stopping` ended the run.
        seconds: time in training steps, over all parts of a resumed run.
        trainable: number of trained values, a head included.
        precision: precision in which the base was held and computed; None in results of earlier versions.
        skipped_steps: number of steps in which fp16 overflowed, so that nothing was learned.
        peak_memory_bytes: peak memory of the device, or of this process on a CPU.
        tokens_per_second: without padding.
        micro_batch: rows per micro-batch at the end, if memory ran out and `batch_size` did not fit; else None.
        compiled: cost and gain of compiling the layers (`Compilation`); None if they are not compiled.
    """

    out: Path
    adapter: Path
    metrics: dict[str, float]
    steps: int
    best_step: int | None
    stopped_early: bool
    seconds: float
    trainable: int
    peak_memory_bytes: int
    tokens_per_second: float
    precision: str | None = None
    skipped_steps: int = 0
    micro_batch: int | None = None
    compiled: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the paths as the command prints them."""
        return {**dataclasses.asdict(self), "out": str(self.out), "adapter": str(self.adapter)}

    def stored(self) -> str:
        """The text of result.json; its paths are relative, so that the folder can be moved."""
        return json.dumps(self.to_dict() | {"out": ".", "adapter": self.adapter.name}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> RunResult:
        """Read the result of a finished run."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "out": path.parent, "adapter": path.parent / "adapter"})


def run(config: RunConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> RunResult:
    """Train an adapter.

    Args:
        config: the configuration.
        resume: continue the run in ``config.out`` from its last checkpoint, with the same numbers as without the stop;
            for a finished run, return its result.
        overwrite: replace the run in ``config.out``.
        progress: show progress on standard error.

    Raises:
        UserError: a mistake that the user can correct. The output folder is unchanged, or has complete files from which
            to resume.
        Stopped: Ctrl-C or SIGTERM; a checkpoint is saved.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other: one goes on with a run, the other replaces it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError(
            "`inlay train` uses one process and one device. For several, attach the adapter in a script of your own "
            "and launch it with torchrun; models with adapters can be trained in any loop"
        )
    folder = RunFolder(config.out)
    folder.check(resume=resume, overwrite=overwrite)
    if resume and folder.finished:
        return RunResult.read(folder.result)
    plainly = fast_paths(False) if config.plain else nullcontext()
    with listening() as request, folder.claimed(), quiet_libraries(), plainly:
        prepared = prepare(config)
        if resume:
            check_identity(folder, prepared)
        else:
            start_folder(folder, prepared)
        if progress:
            sys.stderr.write("".join(f"{line}\n" for line in (prepared.precision, foresee(prepared)) if line))
        return train_prepared(prepared, folder, request, progress=progress)


def resumed_config(out: str | Path, asked: dict[str, Any]) -> RunConfig:
    """The configuration of the run in `out`, for resuming it.

    Args:
        asked: options that the user gave again; they must be the same as in the run.

    Raises:
        OutputError: there is no run.
        ConfigError: lists all options that differ.
    """
    folder = RunFolder(out)
    folder.check(resume=True, overwrite=False)
    saved = RunConfig.read(folder.config).changed(out=str(folder.root.resolve()))
    if saved.precision == "auto":  # of an earlier version, which computed in what the base is stored in
        saved = saved.changed(precision=own_precision(saved.base, saved.quantize))
    values = saved.model_dump(mode="json")  # as in the file: lists, no tuples
    wrong = []
    for name, value in RunConfig.of({**values, **asked}).model_dump(mode="json").items():
        if name not in asked or name == "out" or value == values[name]:
            continue
        if name in ("data", "eval_data", "base") and Path(str(value)).expanduser().resolve() == Path(str(values[name])):
            continue
        if name == "precision" and value == "auto":
            continue
        if name in ("settings", "columns") and all(values[name].get(key) == v for key, v in value.items()):
            continue
        wrong.append(f"{name} is {value!r}, but the run has {values[name]!r}")
    if wrong:
        raise ConfigError(
            problems(
                f"{out} cannot be resumed with other options; leave them out, or start again with --overwrite",
                wrong,
            )
        )
    return saved


def start_folder(folder: RunFolder, prepared: Prepared) -> None:
    """Make room in the folder, and write what a resumed run needs."""
    folder.make_room()
    try:
        write_text(folder.checkpoints / IDENTITY, json.dumps(prepared.identity, indent=2))
        write_text(folder.config, prepared.config.to_yaml())
    except OutputError:
        folder.restore()  # there is too little to resume from
        raise


def check_identity(folder: RunFolder, prepared: Prepared) -> None:
    """Raise if a run would be resumed on other rows or another base."""
    from inlay.core.model.fingerprint import Fingerprint

    path = folder.checkpoints / IDENTITY
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read, so the run cannot be resumed. Start again with --overwrite"
        ) from error
    if before["data"] != prepared.identity["data"]:
        raise DataError(f"{prepared.config.data} has changed since the run began. Start again with --overwrite")
    if Fingerprint.from_dict(before["base"]).differences(Fingerprint.from_dict(prepared.identity["base"])):
        base = prepared.config.base or "the embedded base"
        raise BaseMismatchError(f"{base} has changed since the run began. Start again with --overwrite")


def train_prepared(
    prepared: Prepared, folder: RunFolder, request: StopRequest, *, progress: bool, callbacks: Sequence[Any] = ()
) -> RunResult:
    """Train a prepared run in its folder; `callbacks` are called before the run's own."""
    from transformers.trainer_callback import TrainerState

    from inlay.train.callbacks import Metrics, Pace, Progress, say
    from inlay.train.compiling import compile_run
    from inlay.train.trainer import STATE_FILE, patience_used_up, read_tensors
    from inlay.train.trunk import open_trunk

    config, checkpoint = prepared.config, folder.last_checkpoint()
    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    metrics = Metrics(folder, folder.keep_metrics(state.global_step if state else 0))
    tell = say if progress else lambda _: None
    with ExitStack() as stack:
        bar = stack.enter_context(closing(Progress(metrics))) if progress else None
        if trunk := open_trunk(prepared, tell):
            stack.callback(trunk.close)
        trainer = _trainer(prepared, folder, metrics, bar, trunk, [*callbacks, metrics, Pace(request)])
        stack.enter_context(_explained(config, folder, request, metrics))
        compilation = None
        if config.compile:
            compilation, undo = compile_run(prepared, first=trunk.cut.depth if trunk else 0)
            stack.callback(undo)
            tell(compilation.told(prepared.total_steps))
        if checkpoint is not None and state is not None and _over(state, prepared, patience_used_up):
            trainer.state = state  # the run was killed between its last step and its end
            read_tensors(prepared.adapter, checkpoint / "adapter.safetensors")
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        request.training = False
        if request.number and not _over(trainer.state, prepared, patience_used_up):
            raise _stopped(folder, request)
        trainer.load_best()
        return _finish(prepared, folder, trainer.state, metrics, compilation)


def _trainer(
    prepared: Prepared, folder: RunFolder, metrics: Metrics, bar: Progress | None, trunk: TrunkCache | None,
    callbacks: Sequence[Any],
) -> AdapterTrainer:  # fmt: skip
    from transformers import PrinterCallback

    from inlay.train.trainer import AdapterTrainer

    trainer = AdapterTrainer(
        adapter=prepared.adapter,
        folder=folder,
        task=prepared.task,
        patience=prepared.config.early_stopping,
        told=bar.evaluating if bar else None,
        shrunk=partial(_shrunk, metrics, prepared.config.batch_size),
        serving=_serving(trunk),
        skipped=metrics.skip if prepared.config.precision == "fp16" else None,
        model=prepared.base.model,
        args=_arguments(prepared, folder),
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
        data_collator=prepared.collator,
        callbacks=[*callbacks, *([bar] if bar else [])],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _explained(config: RunConfig, folder: RunFolder, request: StopRequest, metrics: Metrics) -> Iterator[None]:
    """Turn a stop, or a lack of memory, into an error that says how to continue."""
    from inlay.train.passes import ran_out

    try:
        yield
    except Stopped:
        raise _stopped(folder, request) from None
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise ConfigError(
            f"out of memory with {metrics.micro_batch or config.batch_size} rows at a time. Lower --batch-size and "
            "raise --accumulate, give --gradient-checkpointing or a smaller --max-length, and --overwrite"
        ) from error


def _serving(trunk: TrunkCache | None) -> Any:
    """A context manager in which a batch is run: packed or padded, with all layers or those above a cut."""
    from inlay.kernels import packed

    @contextmanager
    def serving(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with packed.serving(batch) as given, trunk.serving(batch) if trunk else nullcontext():
            yield given

    return serving


def _shrunk(metrics: Metrics, asked: int, rows: int) -> None:
    """Record that micro-batches have fewer rows from now on, and warn the first time."""
    if metrics.micro_batch is None:
        sys.stderr.write(
            f"warning: out of memory with {asked} rows at a time; the step is repeated with fewer, which takes longer "
            f"but gives the same batch (--batch-size {rows} with more --accumulate would start this way)\n"
        )
    metrics.micro_batch = rows


def _over(state: Any, prepared: Prepared, patience_used_up: Any) -> bool:
    return bool(state.global_step >= prepared.total_steps or patience_used_up(state, prepared.config.early_stopping))


def _stopped(folder: RunFolder, request: StopRequest) -> Stopped:
    kept = folder.last_checkpoint()
    if kept is None and folder.replaced.is_dir():
        back = f"before a checkpoint; {folder.root} still has the run that would have been replaced"
        return Stopped(f"stopped by {request.name} {back}", request.number)
    step = 0 if kept is None else int(kept.name.rpartition("-")[2])
    again = f"Continue with: inlay train --out {folder.root} --resume"
    return Stopped(f"stopped by {request.name}: saved in {folder.root} up to step {step}. {again}", request.number)


def _arguments(prepared: Prepared, folder: RunFolder) -> Any:
    import torch
    from transformers import TrainingArguments

    from inlay.core.upstream import use_one_device
    from inlay.train.optimizers import optimizer_options

    config = prepared.config
    evaluates = "no" if prepared.held_out is None else "steps"
    assert config.learning_rate is not None and config.schedule is not None and config.warmup is not None
    arguments = TrainingArguments(
        output_dir=str(folder.root),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=math.ceil(config.warmup * prepared.total_steps),
        weight_decay=config.weight_decay or 0.0,
        max_grad_norm=config.max_grad_norm,
        **optimizer_options(config.optimizer, scaled=config.precision == "fp16"),
        seed=config.seed,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy=evaluates,
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.save_every,
        report_to=list(config.report_to),
        run_name=Path(config.out).name,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        log_level="error",
    )
    use_one_device(arguments)
    return arguments


def _finish(
    prepared: Prepared, folder: RunFolder, state: Any, metrics: Any, compilation: Compilation | None
) -> RunResult:
    """Save the adapter and its card, then mark the run as finished."""
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    scores = {"train_loss": sum(losses) / max(len(losses), 1)}
    for line in lines:
        if line["step"] == state.best_global_step:
            scores |= {key: value for key, value in line.items() if key.startswith("eval_")}
    result = RunResult(
        out=folder.root,
        adapter=folder.adapter,
        metrics=scores,
        steps=state.global_step,
        best_step=state.best_global_step,
        stopped_early=state.global_step < prepared.total_steps,
        seconds=round(metrics.seconds, 3),
        trainable=sum(p.numel() for p in prepared.adapter.parameters()),
        peak_memory_bytes=peak_memory_bytes(),
        tokens_per_second=round(metrics.tokens_per_second, 3),
        precision=prepared.config.precision,
        skipped_steps=metrics.skipped,
        micro_batch=metrics.micro_batch,
        compiled=compilation.to_dict() if compilation else None,
    )
    write_beside(folder.adapter, lambda part: _write_adapter(prepared, result, part))
    folder.finish(result.stored())
    return result


def _write_adapter(prepared: Prepared, result: RunResult, part: Path) -> None:
    from inlay.formats import native
    from inlay.train.card import card

    named = dataclasses.replace(prepared.adapter, name=prepared.config.name)  # beside other runs it has another
    native.write(prepared.base.model, named, part)
    prepared.record.write(part)
    facts = {
        "rows": len(prepared.train),
        "eval_rows": 0 if prepared.held_out is None else len(prepared.held_out),
        "trainable": result.trainable,
        "base_parameters": prepared.base_parameters,
        "steps": result.best_step or result.steps,
        "seconds": result.seconds,
    }
    text = card(prepared.config, prepared.method, prepared.record, facts, result.metrics)
    (part / "README.md").write_text(text, encoding="utf-8")


def peak_memory_bytes() -> int:
    """Peak memory of the device, or of this process on a CPU."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
