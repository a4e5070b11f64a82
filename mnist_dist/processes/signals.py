"""Signals that ask a run to stop. They are noted; the run obeys them when it can leave a checkpoint."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux' prctl


def stop_with_launcher() -> None:
    """From now on SIGTERM comes if the parent process ends: a launcher that is killed leaves no rank behind. On Linux
    alone, and only for a parent whose main thread has started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignals:
    """While open, SIGTERM, SIGINT and SIGUSR1 are noted in `number`; a second signal acts at once."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, _frame: object) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
