"""`mnist-dist train`, in which rank 1 fails at its sixth step, as the variable FAILS_BY tells."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch

from mnist_dist import cli
from mnist_dist.processes import heartbeat
from mnist_dist.training.steps.compiled import CompiledStep
from mnist_dist.training.steps.cuda_graph import GraphStep
from mnist_dist.training.steps.plain import PlainStep


def fail() -> None:
    """End, hang, or raise what torch raises."""
    how = os.environ["FAILS_BY"]
    if how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")
    if how == "assert":
        raise RuntimeError("CUDA error: device-side assert triggered")
    if how in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    time.sleep(1000)


def make_fail(kind: Any) -> None:
    """Steps of this kind fail at the sixth of an epoch."""
    take_one = kind.take_one

    def failing(self: Any, step: int) -> Any:
        if step == 5:
            fail()
        return take_one(self, step)

    kind.take_one = failing


def main(argv: Sequence[str]) -> int:
    """As `mnist_dist.cli.main`."""
    heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS = 0.1, 1.0  # sooner than in earnest
    if os.environ.get("RANK") == "1":
        for kind in (PlainStep, CompiledStep, GraphStep):
            make_fail(kind)
    return cli.main(argv)
