"""Signals that ask a run to stop. They are noted; the run obeys them when it can leave a checkpoint."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux' prctl


def stop_with_launcher() -> None:
    """From now on SIGTERM comes if the parent process ends: a launcher that is killed leaves no rank behind. On Linux
    alone, and only for a parent whose main thread has started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def block_ignored() -> None:
    """Where SIGHUP is ignored at the start, as under nohup, it stays so: here and in every process that this one
    starts. torch's launcher would take it back; a signal that is blocked does not come.
    """
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])


class Interrupt(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; handled where Ctrl-C is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal behind it."""
    return interrupt.number if isinstance(interrupt, Interrupt) else signal.SIGINT


@contextmanager
def interrupting() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Interrupt`, unless they are ignored: for a command that starts others, which it
    must end. Not for a rank: it would wait for a collective first.
    """
    def raise_it(number: int, _frame: object) -> None:
        raise Interrupt(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, raise_it) for number in (signal.SIGTERM, signal.SIGHUP)
                  if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """While open, SIGTERM, SIGINT, SIGUSR1 and SIGHUP are noted in `number`; a second signal acts at once. A signal
    that is ignored stays ignored.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

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
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS
                            if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
