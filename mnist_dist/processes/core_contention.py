"""A run beside other busy processes: OpenMP's threads then stop spinning while they wait for each other.

A thread that has done its part of a loop waits for the others, and GNU OpenMP lets it spin for some milliseconds before
it sleeps. On a quiet machine this is right: the next loop begins within microseconds. But Linux counts spinning as use
of the core. If another process wants that core, the thread has used up its share when the next loop begins. It then
waits milliseconds for the core, in each loop of a step. With one busy process beside it on two cores, a run takes some
50 times as long. A thread that sleeps instead gets the core at once.

libgomp has both ways to wait, and takes the short one while there are more OpenMP threads than cores
(`gomp_throttled_spin_count_var` in GCC's libgomp/config/linux/wait.h). So a second pool of threads, which does nothing,
is all that is needed. It changes neither the work of a step nor which thread does it, so no bit of a result.

A thread that sleeps takes long to wake up, compared with the loops of a small step. A step whose results do not depend
on the number of threads takes one thread while others want the cores (`one_thread`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

LOOK_SECONDS = 0.1
TOO_LONG = 0.2  # part of the time between two looks: others have the cores if our threads wait for one for longer
# Seconds for which spins are short. Meanwhile threads hardly wait for a core, so that contention cannot be seen. The
# time doubles each time that contention is still there, from the first number up to the second.
SHORT_SPINS_SECONDS = (2.0, 16.0)

PROCESS = Path("/proc/self")


def openmp_may_spin(on_cpu: bool) -> bool:
    """Whether this process's threads wait by spinning, and it is left to us for how long."""
    if not on_cpu or torch.get_num_threads() == 1 or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return False
    try:
        return (PROCESS / "schedstat").exists() and libgomp_path() is not None
    except OSError:  # not Linux
        return False


def libgomp_path() -> str | None:
    """The file of GNU OpenMP that this process has loaded, if it has. Raises `OSError` if the system does not say."""
    for line in (PROCESS / "maps").read_text().splitlines():
        path = line.partition("/")[2]
        if "libgomp" in path:
            return f"/{path}"
    return None


@functools.cache
def libgomp() -> ctypes.CDLL:
    """GNU OpenMP's functions, in a process where `openmp_may_spin`."""
    return ctypes.CDLL(libgomp_path())


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the context this thread's OpenMP loops run on it alone, also those compiled for a number of threads: no
    level of parallel loops is active (omp_set_max_active_levels of the OpenMP API).
    """
    levels = libgomp().omp_get_max_active_levels()
    libgomp().omp_set_max_active_levels(0)
    try:
        yield
    finally:
        libgomp().omp_set_max_active_levels(levels)


def seconds_used() -> tuple[float, float]:
    """Seconds for which the threads of this process ran on a core, and seconds for which they waited for one, since
    they began (Documentation/scheduler/sched-stats.rst of Linux).
    """
    ran = waited = 0
    for task in (PROCESS / "task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            of_task = (task / "schedstat").read_text().split()
            ran, waited = ran + int(of_task[0]), waited + int(of_task[1])
    return ran / 1e9, waited / 1e9


class CoreContention:
    """Within the context, a thread checks whether other processes want this process's cores. If so, it makes OpenMP's
    spins short for some seconds. `active` is whether they are short, `seconds` is how long they were.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        self.seconds, self.active = 0.0, False
        self._ends = threading.Event()
        self._thread = None
        if openmp_may_spin(on_cpu):
            self._thread = threading.Thread(target=self._run, name="contention", daemon=True)
        # as libgomp counts them, whatever the container's share
        self._cores = len(os.sched_getaffinity(0)) if self._thread else 0

    def __enter__(self) -> CoreContention:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        with suppress(OSError):  # /proc may be forbidden to read
            self._look_on()

    def _look_on(self) -> None:
        shortest, longest = SHORT_SPINS_SECONDS
        seconds = shortest
        before, at = seconds_used(), time.monotonic()
        while not self._ends.wait(LOOK_SECONDS):
            used, now = seconds_used(), time.monotonic()
            ran, waited = (after - first for after, first in zip(used, before, strict=True))
            enough = TOO_LONG * (now - at)
            # threads wait for each other too, as for the one that writes a checkpoint; but then all cores are ours
            if waited > enough and ran < self._cores * (now - at) - enough:
                holder = threading.Thread(target=self._hold_threads, args=(seconds,), name="idle pool")
                holder.start()
                holder.join()
                self.seconds += time.monotonic() - now
                seconds = min(2 * seconds, longest)
                used, now = seconds_used(), time.monotonic()
            else:
                seconds = shortest
            before, at = used, now

    def _hold_threads(self, seconds: float) -> None:
        """Have as many OpenMP threads as there are cores, beside the others; libgomp ends them with this thread."""
        number = torch.get_num_threads()
        torch.set_num_threads(self._cores)  # of this thread
        torch.zeros(self._cores * 40_000, dtype=torch.uint8).add_(1)  # PyTorch gives a thread 32,768 elements at least
        torch.set_num_threads(number)
        self.active = True
        self._ends.wait(seconds)
        self.active = False
