"""A thread for calls that may never return. The caller waits for a limited time and then continues."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one from Python 3.11 on
from typing import Any, TypeVar

T = TypeVar("T")
THREAD_NAME = "mnist-dist-worker"


class Worker:
    """Runs tasks one after the other in a daemon thread, which ends after `close`."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=THREAD_NAME, daemon=True).start()

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, future = item
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)

    def submit(self, task: Callable[[], Any]) -> Future:
        """Run `task` after those submitted before it. The future's `result(timeout)` waits for it."""
        future: Future = Future()
        self._tasks.put((task, future))
        return future

    def close(self) -> None:
        """End the thread after the tasks submitted so far."""
        self._tasks.put(None)


def begun(task: Callable[[], T]) -> Future[T]:
    """Run the task in a thread of its own, which ends with it. The future's `result(timeout)` waits for it."""
    worker = Worker()
    future = worker.submit(task)
    worker.close()
    return future


def within(seconds: float, task: Callable[[], T]) -> T:
    """What `task` returns. Raises `TimeoutError` if it takes longer; its thread then goes on."""
    try:
        return begun(task).result(seconds)
    except FutureTimeout:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def any_left() -> bool:
    """Whether a worker's thread is alive: an orderly exit of Python could wait for what it does."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())
