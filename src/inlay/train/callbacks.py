"""Trainer callbacks, which run between steps: pace, turns, metrics.jsonl, progress."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from inlay.sizes import told_rate, told_seconds
from inlay.train.folder import RunFolder, disk_errors
from inlay.train.stop import StopRequest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

CHECKPOINT_SECONDS = 600  # a killed run loses at most this much time, however many steps lie between its checkpoints
_LINES = 10  # lines of progress if standard error is not a terminal


class Pace(TrainerCallback):
    """Stops when asked to, and saves if the last checkpoint is old; saving draws no random numbers."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.saved_at = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.request.training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            control.should_save = True
        if self.request.number:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = time.monotonic()


class Turn(TrainerCallback):
    """Lets the other runs take a turn before each step of this one."""

    def __init__(self, pass_on: Callable[[], None]) -> None:
        self.pass_on = pass_on

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pass_on()


class Metrics(TrainerCallback):
    """Writes metrics.jsonl and counts tokens and time.

    Attributes:
        seconds: time spent in training steps, without evaluations and checkpoints, including earlier parts of a
            resumed run.
        tokens_per_second: speed in the steps of this part.
        micro_batch: rows of a micro-batch since memory ran out; None if it did not.
        skipped: steps that fp16 overflowed in, by earlier parts too.
    """

    def __init__(self, folder: RunFolder, earlier: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.earlier_seconds: float = earlier[-1]["seconds"] if earlier else 0.0
        self.spent = self.step_seconds = self.started = 0.0
        self.tokens = self.step_tokens = self.tokens_before = 0
        self.micro_batch: int | None = None
        self.skipped: int = max((line.get("skipped_steps", 0) for line in earlier), default=0)

    def skip(self) -> None:
        """Count a step that is left out."""
        self.skipped += 1

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + self.spent

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.spent if self.spent else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()  # from the end of one step to the end of the next, so that making batches is included
        self.step_seconds, self.started = now - self.started, now
        self.step_tokens = state.num_input_tokens_seen - self.tokens_before
        self.tokens_before = state.num_input_tokens_seen
        self.spent += self.step_seconds
        self.tokens += self.step_tokens

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            line |= {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs}
            if not math.isfinite(line.get("grad_norm", 0.0)):  # of a step that was left out; JSON has no such number
                del line["grad_norm"]
            speed = self.step_tokens / max(self.step_seconds, 1e-9)
            line |= {"tokens": self.step_tokens, "tokens_per_second": round(speed, 3)}
            line |= {} if self.micro_batch is None else {"micro_batch": self.micro_batch}
            line |= {"skipped_steps": self.skipped} if self.skipped else {}
        elif "eval_loss" in logs:
            line |= {key: value for key, value in logs.items() if key in ("eval_loss", "eval_accuracy")}
        else:
            return
        line["seconds"] = round(self.seconds, 3)
        with disk_errors(self.folder.metrics), self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Progress(TrainerCallback):
    """A bar with loss, tokens per second and time left, scores below it; plain lines if stderr is not a terminal.

    Args:
        console: where to; None is standard error.
    """

    def __init__(self, metrics: Metrics, console: Console | None = None) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text

        self.console = console or Console(stderr=True)
        self.metrics, self.watched = metrics, self.console.is_terminal
        self.bar = _bar(self.console)
        self.note = Text("", no_wrap=True, overflow="ellipsis")
        self.shown = Group(self.bar, self.note)
        self.live = Live(self.shown, console=self.console, refresh_per_second=4)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first, self.begun = state.global_step, time.monotonic()
        if self.watched:
            self.row = self.bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, loss="", speed="", left=""
            )
            self.live.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        step = f"step {state.global_step:,}/{state.max_steps:,}"
        if "eval_loss" in logs:
            scores = [
                f"{key.removeprefix('eval_')} {logs[key]:,.4f}" for key in ("eval_loss", "eval_accuracy") if key in logs
            ]
            told = f"{step}  held out: {', '.join(scores)}"
            if self.watched:
                self.note.plain = told
            else:
                say(told)
        elif "loss" in logs:
            loss, speed = f"loss {logs['loss']:,.4f}", f"{told_rate(self.metrics.tokens_per_second)} tokens/s"
            if self.watched:
                done = state.global_step
                self.bar.update(self.row, completed=done, loss=loss, speed=speed, left=self._left(state))
            elif state.global_step % max(1, state.max_steps // _LINES) == 0:
                say(f"{step}  {loss}  {speed}  {self._left(state)}")

    def evaluating(self, done: int, total: int) -> None:
        """Called by the trainer during an evaluation."""
        if self.watched:
            self.note.plain = f"evaluating {done:,}/{total:,}"

    def close(self) -> None:
        """Remove the bar, however training ended."""
        if self.watched:
            self.live.stop()

    def _left(self, state: Any) -> str:
        # By the pace since the beginning: a step of a large model takes longer than the half minute rich looks back.
        done = state.global_step - self.first
        seconds = (time.monotonic() - self.begun) / max(done, 1) * (state.max_steps - state.global_step)
        return f"{told_seconds(seconds)} left"


def _bar(console: Console) -> Bar:
    """The row of a progress bar, of which only the bar itself gives way in a narrow terminal."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    def words(template: str) -> TextColumn:
        return TextColumn(template, table_column=Column(no_wrap=True))

    return Bar(
        words("[bold]{task.description}"),
        BarColumn(),
        words("{task.completed:,.0f}/{task.total:,.0f}"),
        *(words(f"{{task.fields[{name}]}}") for name in ("loss", "speed", "left")),
        console=console,
    )


def say(line: str) -> None:
    """Print a line on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
