"""Ctrl-C and SIGTERM: finish the step, save it, and say how to continue."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from inlay.core.errors import InlayError

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(InlayError):
    """A run stopped because it was asked to; not a mistake.

    Attributes:
        exit_code: the usual one of the shell: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
        number: number of the signal; 0 if there was none.
        training: whether a step is running that is worth finishing; else a signal ends the run at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False

    @property
    def name(self) -> str:
        return _NAMES.get(signal.Signals(self.number), str(self.number))

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal: the first is recorded, a second ends the run at once."""
        again = bool(self.number)
        self.number = number
        if again or not self.training:
            raise Stopped(f"stopped by {self.name}", number)
        sys.stderr.write(f"\n{self.name}: finishing this step, then saving a checkpoint (repeat to stop at once)\n")
        sys.stderr.flush()


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Receive SIGINT and SIGTERM within the block, if it runs in the main thread."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {number: signal.signal(number, request.receive) for number in _NAMES}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
