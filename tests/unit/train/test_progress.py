"""What is seen of a training, at the widths that terminals have."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from inlay.train.callbacks import Progress


def shown(width: int, *, steps: int, loss: float, speed: float, evaluated: bool) -> list[str]:
    """The lines of the bar in the middle of a training whose steps took two seconds each."""
    console = Console(width=width, file=StringIO(), force_terminal=True, color_system=None)
    metrics: Any = SimpleNamespace(tokens_per_second=speed)
    progress = Progress(metrics, console)
    state = SimpleNamespace(global_step=0, max_steps=steps)
    progress.on_train_begin(None, state, None)
    progress.close()
    state.global_step = steps // 2
    progress.begun -= steps
    progress.on_log(None, state, None, logs={"loss": loss, "grad_norm": 1.0})
    if evaluated:
        progress.evaluating(1, 2)
        progress.on_log(None, state, None, logs={"eval_loss": loss, "eval_accuracy": 0.5})
    with console.capture() as captured:
        console.print(progress.shown)
    return [line.rstrip() for line in captured.get().splitlines()]


AT_80 = "training ━━━━━━━━━          6,000/12,000 loss 1.2500 1,234 tokens/s 3:20:00 left"
AT_120 = "training ━━━━━━━━━━━━━━━━━━━━                     6,000/12,000 loss 1.2500 1,234 tokens/s 3:20:00 left"


@pytest.mark.parametrize("width, line", [(80, AT_80), (120, AT_120)])
def test_the_bar_alone_gives_way(width: int, line: str) -> None:
    """An evaluation changes nothing in its line."""
    for evaluated in (False, True):
        note = "step 6,000/12,000  held out: loss 1.2500, accuracy 0.5000" if evaluated else ""
        assert shown(width, steps=12_000, loss=1.25, speed=1234.5, evaluated=evaluated) == [line, note]


@pytest.mark.parametrize("loss, speed, steps", [(12.5, 98_765.4, 200_000), (1234.5, 0.31, 3)])
def test_nothing_is_cut_at_80_columns(loss: float, speed: float, steps: int) -> None:
    first, note, *_ = shown(80, steps=steps, loss=loss, speed=speed, evaluated=True)
    assert f"loss {loss:,.4f}" in first and first.endswith(" left") and len(first) <= 80
    assert (" 0.3 tokens/s" if speed < 1 else " 98,765 tokens/s") in first
    assert note.endswith("accuracy 0.5000")
