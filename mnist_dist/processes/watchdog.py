"""Ends this process if its main thread is stuck in a call that does not return.

A call of CUDA has no time limit. If another rank is lost, the replay of a graph may wait for it for ever. Python's
handlers of signals run in the main thread alone, so that no signal ends it either. So a thread looks at the signs of
the main thread while it takes steps. If there are none, it looks for the other ranks' signs of life.

A call that also holds Python's lock stops this thread too. Then faulthandler, whose thread needs no lock, prints where
every thread is, and ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

from mnist_dist.output import complain
from mnist_dist.processes.stop_signals import StopSignals
from mnist_dist.processes.team import ASK_SECONDS, Team

LOOK_SECONDS = 0.25
SIGNAL_SECONDS = 4.0  # after a signal without a sign of the main thread
LOCKED_SECONDS = 30.0  # after --timeout, with a call that holds Python's lock
ARM_SECONDS = 2.0  # between two times that faulthandler is told that the lock is free


class Watchdog:
    """While open, watches the main thread, if that opens it. `sign` returns what changes as long as it makes progress,
    or None if it is not to be watched; `step` returns the last step in which all ranks took part.
    """

    def __init__(self, team: Team, signals: StopSignals, sign: Callable[[], object], step: Callable[[], int]) -> None:
        self.team, self.signals, self.sign, self.step = team, signals, sign, step
        self.is_cuda = team.is_cuda  # its calls wait for a lost rank for ever; on the CPU gloo ends the wait
        self._ends = threading.Event()
        self._signal, self._signal_at = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._is_open = threading.current_thread() is threading.main_thread()
        if not self._is_open:
            return self
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        # the numbers of signals come here at once, and to their handlers when the main thread is back from its call
        self._before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_open:
            return
        signal.set_wakeup_fd(self._before)
        self._ends.set()
        self._thread.join()
        if self.team.size > 1:
            faulthandler.cancel_dump_traceback_later()
        os.close(self._reads)
        os.close(self._writes)

    def _run(self) -> None:
        last_sign, since, has_asked = self.sign(), time.monotonic(), False
        armed_at = since
        while not self._ends.is_set():
            self._read_signals()
            now, sign = time.monotonic(), self.sign()
            if sign is None or sign != last_sign:
                if has_asked and self.team.size > 1:
                    self.team.heartbeats.rest()
                last_sign, since, has_asked = sign, now, False
            elif self._signal or now - since > ASK_SECONDS:
                has_asked = True
                self._look(now, since)
            if now - armed_at > ARM_SECONDS:
                armed_at = now
                self._arm()

    def _arm(self) -> None:
        """Unless this is called again in time, faulthandler ends the process. A rank alone keeps nobody waiting."""
        if self.team.size > 1:
            with contextlib.suppress(ValueError, OSError, AttributeError):  # standard error is no file
                faulthandler.dump_traceback_later(self.team.timeout_s + LOCKED_SECONDS, exit=True)

    def _read_signals(self) -> None:
        """Wait for a signal, for LOOK_SECONDS at most."""
        if select.select([self._reads], [], [], LOOK_SECONDS)[0]:
            for number in os.read(self._reads, 64):
                if number in StopSignals.NUMBERS:
                    self._signal, self._signal_at = number, time.monotonic()

    def _look(self, now: float, since: float) -> None:
        """There was no sign `since`: end the process if there is a reason."""
        team = self.team
        lost: list[int] = []
        if team.size > 1:
            team.heartbeats.ask()
            lost = team.others(team.heartbeats.silent())
        stuck = "a call of the GPU does not return" if self.is_cuda else "a call does not return"
        if lost and self.is_cuda:
            self._end(1, f"process {team.rank} lost {team.named(lost)} after step {self.step()}: {stuck}")
        if team.size > 1 and self.is_cuda and now - since > team.timeout_s:
            self._end(1, f"process {team.rank} timed out after step {self.step()}: {stuck} for {team.timeout_s:g} s")
        # its handler has not seen the signal: the main thread is in one call. On the CPU that may be a slow rank's
        is_stuck = not self.signals.number and (self.is_cuda or team.size == 1)
        if self._signal and now - max(since, self._signal_at) > SIGNAL_SECONDS and (lost or is_stuck):
            name = signal.Signals(self._signal).name
            self._end(128 + self._signal, f"stopped by {name} after step {self.step()}, without a checkpoint: {stuck}")

    def _end(self, status: int, line: str) -> None:
        if self.sign() is not None and not self._ends.is_set():
            complain("error", line)
            sys.stdout.flush()
            os._exit(status)
