"""Signals that ask a run to stop. They are noted, and the run stops when it can write a checkpoint."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
    """The number of the signal that caused it."""
    return interrupt.number if isinstance(interrupt, Interrupt) else signal.SIGINT


@contextmanager
def interrupting() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Interrupt`, and SIGINT `KeyboardInterrupt`, unless they are ignored: for a
    command that starts other processes, which it must end. Not for a rank: it would wait for a collective first.
    """
    def raise_it(number: int, _frame: object) -> None:
        raise Interrupt(number)

    with _handling({signal.SIGTERM: raise_it, signal.SIGHUP: raise_it, signal.SIGINT: signal.default_int_handler}):
        yield


@contextmanager
def ending(last_words: Callable[[int], None]) -> Iterator[None]:
    """Inside, SIGINT ends this process at once, with status 130, after `last_words` with the signal's number, unless it
    is ignored: for a process that has nothing to save yet, and has started no other. An exception that is raised while
    a module is imported can come out of the import as another one.
    """
    def end(number: int, _frame: object) -> None:
        with suppress(Exception):  # as of a stream that is just written to
            last_words(number)
        os._exit(128 + number)

    with _handling({signal.SIGINT: end}):
        yield


@contextmanager
def _handling(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Inside, these signals have these handlers, unless they are ignored; Python allows it in its main thread alone."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()
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
