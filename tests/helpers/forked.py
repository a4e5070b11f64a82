"""Runs command lines in processes that are forked from one that has imported torch already: a second instead of six.

What such a run does is what `python -m mnist_dist` does, in processes of its own; the ranks of a run find each other as
under torchrun. Launchers themselves are tested by test_launch.py, which starts them for real.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# torch._dynamo because every optimizer imports it, which takes a second; with it the compiler's settings are read, so
# that a test which sets CXX needs `mnist_dist_launched`
PRELOADED = ["torch", "torch._dynamo", "accelerate", "mnist_dist.cli", "mnist_dist.training.run",
             "mnist_dist.training.steps.compiled", "mnist_dist.record.run_pictures"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)
# A start looks also at the ranks of other threads, and an exit status can be read once: the second reader gets 255.
_polls = threading.Lock()


def _child(target: str, argv: Sequence[str], environment: Mapping[str, str], cwd: str, files: Sequence[str]) -> None:
    for number, path in zip((1, 2), files, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module, name = target.split(":")
    sys.exit(getattr(importlib.import_module(module), name)(argv))


def run_forked(argv: Sequence[object], *, cwd: Path, size: int = 1, timeout: float = 300, patience: float = 3.0,
               target: str = "mnist_dist.cli:main", environment: Mapping[str, str] | None = None
               ) -> subprocess.CompletedProcess[str]:
    """`target(argv)` on `size` ranks; the exit status is that of the first rank that fails, as under a launcher.

    Raises `subprocess.TimeoutExpired`. A rank that ends with an error ends the others after `patience` seconds.
    """
    words = [str(word) for word in argv]
    common = {**os.environ, **(environment or {})}
    if size > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        for path in files:
            Path(path).touch()
        ranks = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
            ranks.append(_context.Process(target=_child, args=(target, words, {**common, **own}, str(cwd), files)))
            with _polls:
                ranks[-1].start()
        status = _wait(ranks, timeout, patience)
        printed, errors = (Path(path).read_text() for path in files)
    if status is None:
        raise subprocess.TimeoutExpired(words, timeout, printed, errors)
    return subprocess.CompletedProcess(words, status, printed, errors)


def _wait(ranks: Sequence[multiprocessing.Process], timeout: float, patience: float) -> int | None:
    """The exit status of the first rank that failed, else 0; None if one was killed for taking too long."""
    deadline, failed = time.monotonic() + timeout, 0
    while None in (codes := _exit_codes(ranks)):
        alive = [rank for rank, code in zip(ranks, codes, strict=True) if code is None]
        if not failed and (failed := next(filter(None, codes), 0)):
            deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            for rank in alive:
                rank.kill()
            while None in _exit_codes(alive):
                time.sleep(0.01)
            return failed or None
        multiprocessing.connection.wait([rank.sentinel for rank in alive], timeout=0.2)
    return failed or next(filter(None, codes), 0)


def _exit_codes(ranks: Sequence[multiprocessing.Process]) -> list[int | None]:
    with _polls:
        return [rank.exitcode for rank in ranks]
