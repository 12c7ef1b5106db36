"""Being told to stop: a run that keeps checkpoints saves once more, and ends with an exit code of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_INTERRUPTED = 143
"""The exit code of a run that was told to stop: 128 + SIGTERM, as shells and schedulers have it."""


class Interrupted(SystemExit):
    """The run was told to stop by SIGTERM, and has saved; uncaught, it ends the process with `EXIT_INTERRUPTED`."""

    def __init__(self, message: str) -> None:
        """Takes what to tell the user."""
        super().__init__(message)
        self.code = EXIT_INTERRUPTED


class StopFlag:
    """Whether SIGTERM has arrived."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, *_: object) -> None:
        """Notes that it has; this is the signal's handler."""
        self.is_set = True


@contextmanager
def sigterm_noted(wanted: bool) -> Iterator[StopFlag]:
    """Gives a flag that SIGTERM sets instead of ending the process; signals reach a process's main thread only."""
    flag = StopFlag()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.signal(signal.SIGTERM, flag.set)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
