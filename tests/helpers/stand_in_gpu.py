"""A GPU for tests, of which a process on the CPU believes that it has one: a queue that a thread works off.

`mnist-dist train` runs as on a GPU: the step is compiled (for the CPU), recorded as a graph and replayed, and waiting
is done with events. What is stood in for are the calls of `torch.cuda`. A recorded graph is a function that a replay
puts into the queue. All other operations of the main thread wait until the queue is empty, as those of a GPU come after
what is in its queue. A rank that is lost leaves the queue of the others stuck, as NCCL does: no exception arrives.

The process fails, with status 99, if a rank compiles or records while another does something else, or if the ranks part
while a graph is alive.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_dist import cli
from mnist_dist.processes import heartbeat, team
from mnist_dist.processes.team import Team
from mnist_dist.training import pauses
from mnist_dist.training.steps.cuda_graph import GraphStep

RULE_BROKEN = 99


def broken(rule: str) -> None:
    """End this process, which a test notices."""
    print(f"STAND-IN: rank {os.environ.get('RANK', 0)}: {rule}", file=sys.stderr, flush=True)
    os._exit(RULE_BROKEN)


class Queue:
    """What the device has still to do."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[Callable[[], None]] = queue.Queue()
        self.is_on_host = False  # the main thread works with tensors of the host
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while True:
            task = self.waiting.get()
            try:
                task()
            except RuntimeError:  # another rank is lost: a GPU would wait for it without a word
                threading.Event().wait()
            self.waiting.task_done()

    def drain(self) -> None:
        """Wait as an operation that needs the result does."""
        if threading.current_thread() is not self.thread and not self.is_on_host:
            self.waiting.join()


device = Queue()


class Ordered(TorchDispatchMode):
    """Operations of the main thread come after what is in the queue."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device.drain()
        return function(*args, **(kwargs or {}))


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.reached: float | None = None

    def record(self) -> None:
        def reach() -> None:
            self.reached = time.perf_counter()

        device.waiting.put(reach)

    def query(self) -> bool:
        return self.reached is not None

    def elapsed_time(self, other: Event) -> float:
        assert self.reached is not None and other.reached is not None, "the device has not come to it"
        return 1000 * (other.reached - self.reached)


class Graph:
    """`torch.cuda.CUDAGraph`; `function` is what was recorded."""

    alive: ClassVar[set[Graph]] = set()
    function: Callable[[], None]

    def __init__(self) -> None:
        self.alive.add(self)

    def replay(self) -> None:
        device.waiting.put(self.function)

    def reset(self) -> None:
        if not device.waiting.empty():
            broken("a graph is reset while the device has something to do")
        self.alive.discard(self)


def on_host(method: Callable[..., Any]) -> Callable[..., Any]:
    """It does not wait for the queue."""

    def call(*arguments: Any) -> Any:
        device.is_on_host = True
        try:
            return method(*arguments)
        finally:
            device.is_on_host = False

    return call


def meet(own: Team, what: str) -> None:
    """All ranks must come here, and nowhere else."""
    if own.size > 1:
        try:
            dist.monitored_barrier(own._host, timeout=timedelta(seconds=15))
        except RuntimeError:
            broken(f"a rank {what} alone")


def put_in() -> None:
    """Replace what is CUDA's, in this process."""
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def recorded(graph: Graph) -> Iterator[None]:
        device.drain()
        yield

    cuda: Any = torch.cuda
    cuda.Event, cuda.CUDAGraph, cuda.graph = Event, Graph, recorded
    cuda.Stream, cuda.current_stream, cuda.stream = (lambda: stream), (lambda: stream), (lambda stream: nullcontext())
    cuda.synchronize = lambda *which: broken("CUDA's way to wait has no time limit")
    cuda.reset_peak_memory_stats = lambda: None
    Team.is_cuda = True  # type: ignore[method-assign, assignment]

    for name in ("max", "share", "barrier"):  # over gloo, while the GPU works
        setattr(Team, name, on_host(getattr(Team, name)))
    compile_step, record = GraphStep._compile, GraphStep.record

    def compile_together(self: GraphStep) -> None:
        meet(self.team, "compiles")
        compile_step(self)

    def record_together(self: GraphStep) -> None:
        meet(self.team, "records")
        record(self)
        assert self.graph is not None
        self.graph.function = self._step_at_cursor  # type: ignore[attr-defined]
        Ordered().__enter__()  # until the process ends; not earlier, because a mode keeps torch from compiling

    GraphStep._compile, GraphStep.record = compile_together, record_together  # type: ignore[method-assign]
    end = Team.end

    def end_without_graphs(self: Team) -> None:
        end_training = self.accelerator.end_training

        def checked() -> None:
            if Graph.alive:
                broken("the ranks part while a graph is alive")
            end_training()

        self.accelerator.end_training = checked  # type: ignore[method-assign]
        end(self)

    Team.end = end_without_graphs  # type: ignore[method-assign]


def send_at(step: int, number: int) -> None:
    """This process gets the signal at a replay."""
    replay, steps = Graph.replay, iter(range(10**9))

    def then_replay(self: Graph) -> None:
        if next(steps) == step:
            os.kill(os.getpid(), number)
        replay(self)

    Graph.replay = then_replay  # type: ignore[method-assign]


def main(argv: Sequence[str]) -> int:
    """As `mnist_dist.cli.main`. With KILL_AT=R:N (STOP_AT=R:N) rank R gets SIGKILL (SIGTERM) at its N-th replay."""
    heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS, team.ASK_SECONDS = 0.1, 1.0, 0.5  # sooner than in earnest
    pauses.POLL_SECONDS = 60.0  # seldom, so that ranks do not notice a lost one on the host
    put_in()
    for name, number in (("KILL_AT", signal.SIGKILL), ("STOP_AT", signal.SIGTERM)):
        rank, _, step = os.environ.get(name, "").partition(":")
        if rank and rank == os.environ.get("RANK"):
            send_at(int(step), number)
    return cli.main(argv)
