"""Stopping at a step boundary: signals set a flag, the training loop leaves when it has saved."""

from __future__ import annotations

import signal
from types import FrameType

FAILURE, CONFIG, PREEMPTED, INTERRUPTED = 1, 2, 85, 130


class Stopped(BaseException):
    """Training left at a step boundary after saving, because of a signal.

    A BaseException, so that no `except Exception` on the way out mistakes it for a failure.

    Args:
        signum: the signal.
        step: optimizer steps done and saved.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 85 for a preemption; the same command continues the run either way."""
        return INTERRUPTED if self.signum == signal.SIGINT else PREEMPTED


class StopFlag:
    """Remember the first of SIGTERM, SIGUSR1 and SIGINT; a second SIGINT interrupts at once.

    The handler does nothing else: saving or communicating inside a handler runs in the middle of a step.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signum = 0

    def install(self) -> None:
        """Catch the signals in this process (main thread only)."""
        for signum in self.signals:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Set the flag."""
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
