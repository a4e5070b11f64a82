"""Starts the processes of a run on a Ray cluster: `mnist-dist train --launcher ray`.

Ray decides which nodes the processes are on. If a node or a process is lost, it makes a new group, of another size if
it must. Each of its workers starts `mnist-dist train` in a new process, as torchrun would, and waits for it: signals,
the exit status and what is printed are then as under every launcher. A board, which is an actor on this machine, takes
what the processes print and how they have ended, and passes signals on to them.

In one file, because all that knows Ray is here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist.disk.files import make_folder, remove, remove_tree, write_synced
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.output import say
from mnist_dist.processes.launch_environment import child_environment, num_cores, variables_of
from mnist_dist.processes.stop_signals import StopSignals
from mnist_dist.processes.stores import Wait
from mnist_dist.text import counted, cut, first_line, whole

POLL_SECONDS = 0.2  # between two looks at the board
ANSWER_SECONDS = 10.0  # for a cluster's port to take a connection
LOOK_SECONDS = 30.0  # for a node to say whether it sees the run's folder
GROUP_SECONDS = 20  # that Ray waits for a group of the same size after a loss, before it makes a smaller group
GROW_SECONDS = 20.0  # between two looks whether the cluster has room for a larger group
MOST_OF_RAYS = 300  # characters of a message
GRACE_SECONDS = 30.0  # after a signal, for the processes to leave a checkpoint
OTHER = 4  # what a process ends with instead of 1, if not because another process is lost: a full disk
FINAL = (0, 2, 3, OTHER)  # exit statuses that another start does not change: done, wrong use, diverged


def least_and_most(text: str) -> tuple[int, int] | None:
    """`N` is (N, N), and `LEAST:MOST` what it says; None if it is neither, or less than 1."""
    first, _, last = text.rpartition(":")
    least, most = whole(first or last), whole(last)
    return (least, most) if least and most and least <= most else None


class Group(NamedTuple):
    """How many processes Ray may start, and on what."""

    least: int
    most: int
    on_gpus: bool

    def __str__(self) -> str:
        return counted(self.most, "process", "processes")


class Board:
    """What the driver and the workers exchange. An actor on the driver's node."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, bool]] = []  # and whether on standard error
        self.statuses: list[dict[int, int]] = []  # of each start: the exit status of each rank
        self.signal = 0

    def start(self) -> int:
        """A new group begins: its number, from 0."""
        self.statuses.append({})
        return len(self.statuses) - 1

    def say(self, line: str, is_error: bool) -> None:
        """What a process has printed."""
        self.lines.append((line, is_error))

    def end(self, start: int, rank: int, status: int) -> None:
        """How a process has ended."""
        self.statuses[start][rank] = status

    def stop(self, signal_number: int) -> None:
        """The processes shall get this signal."""
        self.signal = signal_number

    def wanted(self) -> int:
        """The signal that the processes shall get, 0 if none."""
        return self.signal

    def news(self) -> tuple[list[tuple[str, bool]], list[dict[int, int]]]:
        """The lines since the last call, and how the processes of all starts have ended."""
        lines, self.lines = self.lines, []
        return lines, self.statuses


def work(job: dict[str, Any]) -> None:
    """One worker: runs its process of the group. Raises `RuntimeError` if Ray shall start all of them again."""
    import ray
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    context, board = train.get_context(), job["board"]
    rank, size = context.get_world_rank(), context.get_world_size()
    place = (ray.util.get_node_ip_address(), _free_port(), ray.get(board.start.remote())) if rank == 0 else None
    address, port, start = broadcast_from_rank_zero(place)
    local_size = context.get_local_world_size()
    environment = {**child_environment(), **variables_of(
        rank=rank, size=size, local_rank=context.get_local_rank(), local_size=local_size, address=address, port=port,
        restart=start, max_restarts=job["max_restarts"], on_cpu=not job["on_gpus"], final_status=OTHER)}
    environment["OMP_NUM_THREADS"] = job["threads"] or str(max(1, num_cores() // local_size))
    # Ray blocks SIGINT in its workers, and a process inherits what is blocked
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    process = subprocess.Popen([sys.executable, "-m", "mnist_dist", *job["arguments"]], cwd=job["folder"], text=True,
                               env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    threading.Thread(target=_pass_signals, args=(process, board), daemon=True).start()
    readers = [threading.Thread(target=_pass_lines, args=(pipe, board, pipe is process.stderr), daemon=True)
               for pipe in (process.stdout, process.stderr)]
    for reader in readers:
        reader.start()
    status = process.wait()
    for reader in readers:
        reader.join(POLL_SECONDS)  # a child that lives on may hold the pipe
    ray.get(board.end.remote(start, rank, status))
    if status not in FINAL and not ray.get(board.wanted.remote()):
        raise RuntimeError(f"process {rank} ended with status {status}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _pass_lines(pipe: Any, board: Any, is_error: bool) -> None:
    for line in pipe:
        board.say.remote(line, is_error)


def _pass_signals(process: subprocess.Popen[str], board: Any) -> None:
    import ray

    while process.poll() is None:
        if number := ray.get(board.wanted.remote()):
            process.send_signal(number)
            return
        time.sleep(POLL_SECONDS)


def launch(arguments: Sequence[str], group: Group, folder: Path, max_restarts: int, timeout_s: float) -> int:
    """Run `mnist-dist ARGUMENTS` on the cluster that RAY_ADDRESS names, else on a new one on this machine; the
    exit status. `folder` is the run's, which all nodes share. Raises `UserError` if the cluster is not fit for it, or
    has not started the processes after `timeout_s`.
    """
    wait = Wait(timeout_s, lambda: f"Ray to start {group}")
    notice = threading.Timer(wait.notice_s, wait.is_over)
    notice.daemon = True
    notice.start()
    # Ray reads these when it is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(GROUP_SECONDS))
    try:
        import ray
        from ray.train.v2.api import config as train
        from ray.train.v2.api import data_parallel_trainer as trainers
    except ImportError:
        raise UserError("--launcher ray needs Ray: pip install -e '.[ray]'") from None
    try:
        _connect(group)
        _check(group, folder)
        board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=_on_node(
            ray.get_runtime_context().get_node_id())).remote()
        job = {"board": board, "arguments": [*arguments], "folder": os.getcwd(), "max_restarts": max_restarts,
               "on_gpus": group.on_gpus, "threads": os.environ.get("OMP_NUM_THREADS")}
        size = group.most if group.least == group.most else (group.least, group.most)
        kind: Any = trainers.DataParallelTrainer  # its annotations are those of an earlier Ray Train
        trainer = kind(
            work, train_loop_config=job, scaling_config=train.ScalingConfig(
                num_workers=size, use_gpu=group.on_gpus, elastic_resize_monitor_interval_s=GROW_SECONDS),
            run_config=train.RunConfig(name=uuid.uuid4().hex, storage_path=str(folder / "ray"),
                                       failure_config=train.FailureConfig(max_failures=max_restarts),
                                       logging_config=train.LoggingConfig(log_level="ERROR")))
        return _follow(trainer, board, max_restarts, wait, group)
    finally:
        notice.cancel()
        ray.shutdown()
        with contextlib.suppress(OSError):
            remove_tree(folder / "ray")  # Ray's own notes: a run continues from its checkpoints


def _shorten() -> None:
    """Ray prints a page on standard output for each lost node, and prints it again later. Here it is one line on
    standard error. Ray has no option for this: a version whose function has another name prints the page.
    """
    from ray._private import worker

    module: Any = worker
    said = set()

    def print_first_sentence(message: Any, ignore_prefix: bool = False) -> None:
        sentence = cut(" ".join(str(message["lines"][0]).split(". ", 1)[0].split()), MOST_OF_RAYS)
        if sentence not in said:
            said.add(sentence)
            say(f"mnist-dist: Ray says: {sentence}", is_error=True)

    module.print_to_stdstream = print_first_sentence


def _connect(group: Group) -> None:
    import ray

    _shorten()
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {} if address else {
        "address": "local", "num_cpus": max(group.most, num_cores()), "include_dashboard": False}
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        ray.init(**options, logging_level=logging.ERROR, log_to_driver=False,
                 runtime_env={"env_vars": {"PYTHONPATH": child_environment()["PYTHONPATH"]}})
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"Ray's cluster at {address} is not reached ({reason}): see `ray status` there, or unset "
                        "RAY_ADDRESS to run on this machine" if address else f"Ray does not start here ({reason})"
                        ) from None


def _on_node(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _check(group: Group, folder: Path) -> None:
    """Is the cluster large enough, and does each of its nodes see the folder? Raises `UserError`."""
    import ray

    what = "GPU" if group.on_gpus else "CPU"
    there = int(ray.cluster_resources().get(what, 0))
    if there < group.least:
        raise UserError(f"{group.least} processes need {group.least} {what}s, and Ray's cluster has {there}: "
                        "give fewer --processes, or add nodes")
    make_folder(folder / "ray")
    mark = folder / "ray" / f"seen-{uuid.uuid4().hex}"
    write_synced(mark, b"")
    look = ray.remote(num_cpus=0)(_sees)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [look.options(scheduling_strategy=_on_node(node["NodeID"])).remote(str(mark)) for node in nodes]
    blind = []
    try:
        for node, answer in zip(nodes, asked, strict=True):
            with contextlib.suppress(ray.exceptions.RayError):  # the node is lost, and Ray is about to notice it
                if not ray.get(answer, timeout=LOOK_SECONDS):
                    blind.append(node["NodeManagerHostname"])
    finally:
        remove(mark)
    if blind:
        raise UserError(f"{', '.join(blind)} does not see {folder}: give an --output-dir on a file system that all "
                        "nodes of the cluster share, because the processes go on from its checkpoints on any of them")


def _sees(path: str) -> bool:
    return os.path.exists(path)  # where Path.exists raises, as without permission: it does not see it


def _follow(trainer: Any, board: Any, max_restarts: int, wait: Wait, group: Group) -> int:
    """Print what the processes print, and pass signals on, until Ray has done; the exit status. Raises `UserError` if
    nothing has started when the `wait` is over.
    """
    import ray

    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failed.append(error)

    fitting = threading.Thread(target=fit, daemon=True)
    reported, until = 0, float("inf")
    with StopSignals() as signals:
        fitting.start()
        while True:
            is_done = not fitting.is_alive()
            lines, starts = ray.get(board.news.remote())
            if not starts and not is_done and wait.is_over():
                raise UserError(f"Ray has not started {group} within {wait.limit_s:g} s (--timeout): see `ray status`, "
                                "and what else runs on the cluster")
            for line, is_error in lines:
                print(line, end="", flush=True, file=sys.stderr if is_error else sys.stdout)
            if signals.number and until == float("inf"):
                ray.get(board.stop.remote(signals.number))
                until = time.monotonic() + GRACE_SECONDS
            if is_done or time.monotonic() > until:
                break
            if reported < len(starts) <= max_restarts and not set(FINAL).issuperset(starts[-1].values()):
                reported = len(starts)
                say(f"mnist-dist: Ray looks for a new group: for {GROUP_SECONDS} s of the same size", is_error=True)
            time.sleep(POLL_SECONDS)
    if signals.number:
        return 128 + signals.number
    failures = {rank: status for rank, status in (starts[-1] if starts else {}).items() if status}
    if not failed and not failures:
        return 0
    if ended := [status for _, status in sorted(failures.items()) if status > 0]:
        return MnistDistError.exit_status if ended[0] == OTHER else ended[0]
    if failures:
        rank, status = next(iter(failures.items()))
        raise MnistDistError(f"process {rank} was ended by {signal.Signals(-status).name}")
    reason = " ".join(str(failed[0]).split())[:300]
    raise MnistDistError(f"Ray gave up after {len(starts)} starts ({reason}): see `ray status`, and Ray's logs on "
                         f"{platform.node()}")
