"""Ends the processes of this machine if another machine has failed, and they do not end by themselves.

A process that waits for a lost process ends in time. A process that is stopped or hangs does not, and its launcher
waits for it. So each launcher writes into the store in which they met that it has failed.
"""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from typing import Any

import psutil

from mnist_dist.worker import within

ANSWER_SECONDS = 2.0  # of the store; after that it is lost
LOOK_SECONDS = 0.5
STOPPED_SECONDS = 5.0  # until a stopped process is killed
GRACE_SECONDS = 30.0  # until another process is killed: it may write a checkpoint or send the rest to W&B


class Watch:
    """A thread that watches the other machines until `end`. `ended` says what it has done, "" if nothing."""

    def __init__(self, store: Any, machine: int) -> None:
        from torch.distributed import PrefixStore

        self.store, self.machine, self.ended = PrefixStore("mnist_dist/watch", store), machine, ""
        self._over, self._is_lost = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def end(self, *, failed: bool) -> None:
        """This machine has ended: write that for the others."""
        self._over.set()
        self._thread.join(2 * ANSWER_SECONDS)
        with contextlib.suppress(RuntimeError, OSError):
            if failed and not self._is_lost:
                within(ANSWER_SECONDS, lambda: self.store.add("failed", 1))
            elif not failed and self.machine == 0:
                within(ANSWER_SECONDS, lambda: self.store.add("over", 1))
                time.sleep(2 * LOOK_SECONDS)  # the store ends with this process, and all must read it first

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            try:
                if within(ANSWER_SECONDS, lambda: self.store.add("over", 0)):
                    return
                if within(ANSWER_SECONDS, lambda: self.store.add("failed", 0)):
                    break
            except (RuntimeError, OSError):  # machine 0, which has the store
                self._is_lost = True
                break
        begin, are_stopped = time.monotonic(), False
        while time.monotonic() < begin + (STOPPED_SECONDS if are_stopped else GRACE_SECONDS):
            if self._over.wait(LOOK_SECONDS):
                return
            are_stopped = any(map(_is_stopped, _processes()))
        self.ended = (f"another machine has failed, and the processes on {platform.node()} did not end by themselves "
                      f"({'stopped' if are_stopped else 'they hang'}): they have been ended")
        for process in _processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _processes() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _is_stopped(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_STOPPED
    return False
