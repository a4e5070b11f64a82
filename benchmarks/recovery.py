"""How fast a run is back at work after `kill -9` of a rank, under each launcher that starts its processes again.

    python -m benchmarks.recovery DATA_DIR OUTPUT.json [--tries 20] [--minutes 5] [--seed 0]

Of each launcher: so many kills of a random rank at random moments, each at least a second after the first step of a
start; then so many minutes with one kill a minute. Recovery is the time from the kill until everything is ready for the
next step; goodput is the time of the steps and evaluations that the run keeps, over the time since its first step.
Writes OUTPUT.json, prints Markdown; the exit status is 1 if a run did not come back.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults import is_stepping, named
from benchmarks.machine import describe
from mnist_dist import runner
from mnist_dist.disk.files import replace_json
from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.tables import spread, table

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2
LAUNCHERS = {
    "mnist-dist train --processes 2 --max-restarts N": [
        sys.executable, "-m", "mnist_dist", "train", "--processes", str(PROCESSES), "--max-restarts", "1000"],
    "torchrun --nproc-per-node 2 --max-restarts N": [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}",
        "--max-restarts=1000", str(ROOT / "train.py")],
    "accelerate launch --num_processes 2 --max_restarts N": [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1",
        f"--num_processes={PROCESSES}", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
        "--max_restarts=1000", str(ROOT / "train.py")],
}
OPTIONS = ["--dataset", "mnist", "--epochs", "1000000", "--checkpoint-every", "2s", "--wandb", "disabled"]
LIMIT_SECONDS = 120.0  # a start that takes longer hangs
KILL_EVERY_SECONDS = 60.0


@dataclass
class Try:
    """One kill and what came after it, in seconds."""

    rank: int
    after: float  # from the first step of the start to the kill
    recovery: float  # from the kill until the next start is ready for its first step
    to_processes: float  # of that, until the main process of the next start was there


class Launched:
    """A launch whose processes are killed."""

    def __init__(self, words: list[str], data_dir: str, scratch: Path) -> None:
        self.folder, self._printed, self._mark = scratch / "run", scratch / "printed.txt", uuid.uuid4().hex
        environment = {**child_environment(), "ACCELERATE_USE_CPU": "true", runner.MARK: self._mark}
        with open(self._printed, "w") as printed:
            self.process = subprocess.Popen(
                [*words, *OPTIONS, "--data-dir", data_dir, "--output-dir", str(self.folder)], env=environment,
                stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT)
        self.starts, self._main = 0, 0

    def next_start(self) -> tuple[float, float]:
        """Wait until the next start is ready for its first step: when its main process began, and when it was ready."""
        self.starts += 1
        limit, began = time.time() + LIMIT_SECONDS, 0.0
        while not is_stepping(self._printed, starts=self.starts):
            if self.process.poll() is not None or time.time() > limit:
                raise RuntimeError(f"start {self.starts} did not come: {self._printed.read_text()[-2000:]}")
            if not began and (main := named(self.process, "rank 0")) and main.pid != self._main:
                self._main, began = main.pid, time.time()
            time.sleep(0.02)
        return began, time.time()

    def kill(self, rank: int) -> float:
        """`kill -9` of this rank; returns when."""
        victim = named(self.process, f"rank {rank}")
        if victim is None:
            raise RuntimeError(f"rank {rank} is not there")
        victim.kill()
        return time.time()

    def stop(self) -> float:
        """End the run by a signal, as a person would; returns the seconds of its epochs, each counted once."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return sum(float(json.loads(line)["epoch_seconds"]) for line in lines)

    def close(self) -> None:
        """Leave no process behind."""
        runner.end_tree(self._mark)
        self.process.wait()


@contextmanager
def launched(words: list[str], data_dir: str) -> Iterator[Launched]:
    """A launch in a folder of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        launch = Launched(words, data_dir, Path(scratch))
        try:
            yield launch
        finally:
            launch.close()


def recoveries(words: list[str], data_dir: str, tries: int, chance: random.Random) -> dict[str, Any]:
    """So many kills in one launch."""
    with launched(words, data_dir) as launch:
        began, ready = launch.next_start()
        first, attempts = ready - began, []
        while len(attempts) < tries:
            after, rank = chance.uniform(1.0, 5.0), chance.randrange(PROCESSES)
            time.sleep(max(0.0, ready + after - time.time()))
            killed = launch.kill(rank)
            began, ready = launch.next_start()
            attempts.append(Try(rank, after, ready - killed, began - killed))
            print(attempts[-1], file=sys.stderr, flush=True)
        launch.stop()
    return {"first_start_seconds": first, "tries": [vars(a_try) for a_try in attempts]}


def goodput(words: list[str], data_dir: str, minutes: float, chance: random.Random) -> dict[str, Any]:
    """A run of so many minutes, killed once in each."""
    with launched(words, data_dir) as launch:
        _, begin = launch.next_start()
        for minute in range(int(minutes)):
            # in the first half minute, so that the last kill has its price
            time.sleep(max(0.0, begin + minute * KILL_EVERY_SECONDS + chance.uniform(10, 30) - time.time()))
            launch.kill(chance.randrange(PROCESSES))
            launch.next_start()
        time.sleep(max(0.0, begin + KILL_EVERY_SECONDS * minutes - time.time()))
        wall = time.time() - begin
        return {"wall_seconds": wall, "kept_seconds": launch.stop(), "kills": int(minutes)}


def say(seconds: Sequence[float]) -> str:
    """Median (minimum to maximum); some are below 0."""
    median, low, high = spread(seconds)
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def line(name: str, row: dict[str, Any]) -> list[str]:
    """One launcher's figures."""
    tries, first = row["recoveries"]["tries"], row["recoveries"]["first_start_seconds"]
    recovery = [a_try["recovery"] for a_try in tries]
    kept = row["goodput"]
    return [f"`{name}`", f"{len(tries)} of {row['wanted']}", say(recovery),
            say([a_try["to_processes"] for a_try in tries]), f"{first:.1f}",
            say([seconds - first for seconds in recovery]),
            f"{100 * kept['kept_seconds'] / kept['wall_seconds']:.1f}" if kept else "-"]


def main() -> None:
    """Measure every launcher, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    for name, words in LAUNCHERS.items():
        chance = random.Random(f"{args.seed}-{name}")
        rows[name] = {"wanted": args.tries,
                      "recoveries": recoveries(words, args.data_dir, args.tries, chance),
                      "goodput": goodput(words, args.data_dir, args.minutes, chance) if args.minutes else None}
        replace_json(args.output, {"machine": describe(), "seed": args.seed, "options": OPTIONS, "launchers": rows})
    head = ["launcher", "came back", "recovery, s", "of it until the processes are there, s", "first start, s",
            "beyond that, s", "goodput at a kill a minute, %"]
    print("\n".join(table(head, [line(name, row) for name, row in rows.items()])))


if __name__ == "__main__":
    main()
