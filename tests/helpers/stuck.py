"""`mnist-dist train`, of which a rank's main thread is stuck in a call of C for ever.

STUCK_AT=R:N: rank R is stuck at its N-th step, in a call that holds Python's lock if HOLDS_LOCK is set. It gets SIGTERM
after SIGNAL_AFTER seconds, and rank KILLED is killed at the same step. Time limits are shorter than in use, unless
IN_EARNEST is set. The file `stuck_at` has the time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_dist import cli
from mnist_dist.processes import heartbeat, team, watchdog
from mnist_dist.training.steps.plain import PlainStep


def block(holds_lock: bool) -> None:
    """Lock a mutex twice: no signal interrupts that."""
    library = ctypes.PyDLL(None) if holds_lock else ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(128)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def main(argv: Sequence[str]) -> int:
    """As `mnist_dist.cli.main`."""
    if not os.environ.get("IN_EARNEST"):
        heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS = 0.1, 1.0
        team.ASK_SECONDS = watchdog.ASK_SECONDS = 0.5
        watchdog.ARM_SECONDS, watchdog.LOCKED_SECONDS = 0.2, 1.0
    start = watchdog.Watchdog.__enter__

    def on_gpu(self: watchdog.Watchdog) -> watchdog.Watchdog:
        self.is_cuda = True
        return start(self)

    if os.environ.get("IS_CUDA"):
        watchdog.Watchdog.__enter__ = on_gpu  # type: ignore[method-assign]
    stuck, _, number = os.environ["STUCK_AT"].partition(":")
    rank, take_one = os.environ.get("RANK", "0"), PlainStep.take_one

    def then_block(self: Any, step: int) -> Any:
        if step == int(number) and rank == os.environ.get("KILLED"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == int(number) and rank == stuck:
            Path("stuck_at").write_text(str(time.time()))
            if after := os.environ.get("SIGNAL_AFTER"):
                threading.Timer(float(after), os.kill, (os.getpid(), signal.SIGTERM)).start()
            block(bool(os.environ.get("HOLDS_LOCK")))
        return take_one(self, step)

    PlainStep.take_one = then_block  # type: ignore[method-assign]
    return cli.main(argv)
