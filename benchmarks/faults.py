"""Kills a run again and again, and compares what it learns with the run that was left alone.

    python -m benchmarks.faults DATA_DIR OUTPUT [--kills 1200] [--seed 0] [--minutes 60] [--batch-size 500]

A plan of faults follows from the seed: of each start the number of processes (1 to 4), whom `kill -9` hits (a rank
or the launcher), and when: from the start to the first step, or during the training. Each killed run is resumed
until it is done, and then compared: SHA-256 of the model and of the last checkpoint (weights, Adam, sums), and every
line of metrics.jsonl but its times. Every fifth run is also recorded in W&B, offline, and its history is compared
too. Writes OUTPUT/faults.json after each run and prints Markdown. The same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import describe
from mnist_dist import runner
from mnist_dist.disk.files import replace_json
from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.tables import table

EPOCHS, PROCESSES = 2, (1, 2, 3, 4)
OPTIONS = ["--dataset", "mnist", "--reproducible", "--epochs", str(EPOCHS), "--checkpoint-every", "20steps", "--resume"]
TRACKED_EVERY = 5  # runs of which one is recorded in W&B: that takes a second at each start
TIMES = {"train_seconds", "warmup_seconds", "measured_seconds", "eval_seconds", "epoch_seconds", "step_ms_p50",
         "step_ms_p95", "measured_samples", "samples_per_second", "samples_per_second_per_process",
         "data_wait_fraction", "peak_memory_bytes", "ranks", "windows"}  # of a line: what a fault may change
END_SECONDS = 60.0  # a start that takes so much longer than expected hangs
LATEST = 1.7  # of a plan's `when`: the last part of a training comes in a resumed start, which has less to do


@dataclass
class Start:
    """One start of a run: what was done to it, and what became of it."""

    processes: int
    victim: str  # "launcher", "rank 1" or "", if it ended before its kill
    seconds: float  # from the start to its end
    to_first_step: float | None  # from the start to the first step
    lost_seconds: float | None  # of training: from the newest checkpoint, or the first step, to the kill


@dataclass
class Campaign:
    """What the faults have come to so far."""

    starts: list[Start] = field(default_factory=list)
    runs: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Starts that were killed."""
        return sum(bool(start.victim) for start in self.starts)

    def expected(self, processes: int, when: float) -> float:
        """Seconds from the start to `when`: 0 is the start, 1 the first step, 2 the end of a whole training."""
        ready = [start.to_first_step for start in self.starts
                 if start.processes == processes and start.to_first_step is not None]
        alone = self.starts[0]  # what is compared with: it is not killed
        first_step_alone = alone.to_first_step or alone.seconds
        to_first_step = statistics.median(ready or [first_step_alone * (processes + 1) / 2])  # a guess, for two cores
        return min(when, 1.0) * to_first_step + max(when - 1.0, 0.0) * (alone.seconds - first_step_alone)


def result_of(folder: Path, tracked: bool) -> dict[str, Any]:
    """What a run has come to: figures that no fault may change."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    newest = max((folder / "checkpoints").glob("step-*"))
    return {
        "model": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "checkpoint": json.loads((newest / "manifest.json").read_bytes())["tensors.safetensors"],
        "lines": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
        "points": [{**json.loads(line), "samples_per_second": None}
                   for line in (folder / "steps.jsonl").read_text().splitlines()],
        "history": history(folder) if tracked else None,
    }


def history(folder: Path) -> list[dict[str, Any]]:
    """What W&B has of the run's training and tests, in the folder that it has written last."""
    done = runner.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder / "wandb" / "latest-run"],
                      timeout=END_SECONDS)
    items = [record["history"]["item"] for record in map(json.loads, done.stdout.splitlines())
             if record["type"] == "history"]
    return [{name: value for name, value in item.items() if name.startswith(("train/", "test/", "_step"))}
            for item in items if "train/train_loss" in item]


def start(folder: Path, args: argparse.Namespace, processes: int, tracked: bool, victim: str, delay: float,
          limit: float) -> Start:
    """Start the run in `folder`, and kill the victim after `delay` seconds if it is still there."""
    mark, begin = uuid.uuid4().hex, time.monotonic()
    words = [sys.executable, "-m", "mnist_dist", "train", *OPTIONS, "--data-dir", args.data_dir, "--batch-size",
             str(args.batch_size), "--processes", str(processes), "--wandb", "offline" if tracked else "disabled",
             "--output-dir", str(folder)]
    with open(folder.parent / "printed.txt", "w") as printed:
        launcher = subprocess.Popen(words, env={**child_environment(), runner.MARK: mark}, stdin=subprocess.DEVNULL,
                                    stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        first_step, lost, killed = None, None, False
        try:
            while launcher.poll() is None:
                now = time.monotonic() - begin
                if first_step is None and is_stepping(folder.parent / "printed.txt"):
                    first_step = now
                if not killed and now >= delay and (process := named(launcher, victim)) is not None:
                    if first_step is not None:
                        lost = time.time() - _newest_time(folder, time.time() - now + first_step)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                        killed = True
                if now > limit:
                    raise TimeoutError(f"{folder}: {processes} processes were not done after {limit:.0f} s")
                time.sleep(0.01)
        finally:
            runner.end_tree(mark)  # what a launcher leaves behind, as a scheduler does it
            launcher.wait()
    if not killed and launcher.returncode:
        raise RuntimeError(f"{folder}: exit status {launcher.returncode} without a kill: "
                           f"{(folder.parent / 'printed.txt').read_text()[-2000:]}")
    return Start(processes, victim if killed else "", time.monotonic() - begin, first_step, lost)


def is_stepping(printed: Path, starts: int = 1) -> bool:
    """So many starts have come to their first step: then everything is ready, and they print a table's head."""
    return printed.read_text().count("train loss") >= starts


def named(launcher: subprocess.Popen[bytes], victim: str) -> psutil.Process | None:
    """The victim's process; None if it is not there yet."""
    with contextlib.suppress(psutil.Error):
        if victim == "launcher":
            return psutil.Process(launcher.pid)
        rank = victim.split()[1]
        for process in psutil.Process(launcher.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == rank:
                    return process
    return None


def _newest_time(folder: Path, otherwise: float) -> float:
    """When the newest checkpoint of this start was written, else when its first step was taken."""
    times = [otherwise]
    for path in folder.glob("checkpoints/step-*"):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def plan(seed: int, run: int) -> Iterator[tuple[int, str, float]]:
    """For one start of this run after the other: processes, victim, and when (see `Campaign.expected`)."""
    chance = random.Random(f"{seed}-{run}")
    while True:
        processes = chance.choice(PROCESSES)
        victims = ["launcher", *(f"rank {rank}" for rank in range(processes))] if processes > 1 else ["launcher"]
        yield processes, chance.choice(victims), chance.uniform(0.0, LATEST)


def one_run(campaign: Campaign, number: int, args: argparse.Namespace, reference: dict[str, Any]) -> None:
    """Kill and resume a run until it is done, and compare it."""
    folder = args.output / f"run-{number:04d}" / "run"
    shutil.rmtree(folder.parent, ignore_errors=True)  # of a campaign that was ended in it
    folder.parent.mkdir(parents=True)
    tracked = number % TRACKED_EVERY == 0
    for processes, victim, when in plan(args.seed, number):
        campaign.starts.append(start(folder, args, processes, tracked, victim, campaign.expected(processes, when),
                                     campaign.expected(processes, 2.0) + END_SECONDS))
        if not campaign.starts[-1].victim:  # it has ended by itself: with its result alone, W&B may lack the end
            break
    campaign.runs += 1
    outcome = {**result_of(folder, tracked), **({} if tracked else {"history": reference["history"]})}
    if outcome == reference:
        shutil.rmtree(folder.parent)
    campaign.wrong += [f"{folder.parent.name}: another {name}"
                       for name, value in reference.items() if outcome[name] != value]


def save(campaign: Campaign, args: argparse.Namespace, reference: dict[str, Any], begin: float) -> None:
    """Write what there is."""
    replace_json(args.output / "faults.json", {
        "machine": describe(), "seed": args.seed, "command": OPTIONS, "batch_size": args.batch_size,
        "seconds": time.monotonic() - begin,
        "runs": campaign.runs, "kills": campaign.kills, "wrong": campaign.wrong, "reference": reference,
        "starts": [vars(start) for start in campaign.starts],
    })


def lines_of(campaign: Campaign) -> list[list[str]]:
    """A line for each number of processes."""
    lines = []
    for processes in PROCESSES:
        starts = [start for start in campaign.starts if start.processes == processes]
        killed = [start for start in starts if start.victim]
        ready = [start.to_first_step for start in starts if start.to_first_step is not None]
        lost = [start.lost_seconds for start in killed if start.lost_seconds is not None]
        lines.append([f"{processes}", f"{len(killed)}", f"{sum(start.victim == 'launcher' for start in killed)}",
                      f"{len(lost)}",
                      f"{statistics.median(ready):.1f}" if ready else "-",
                      f"{statistics.median(lost):.2f}" if lost else "-"])
    return lines


def main() -> None:
    """Carry the plan out, print; the exit status is 1 if a run came to something else."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch-size", type=int, default=500)
    args = parser.parse_args()
    begin, campaign, reference = time.monotonic(), Campaign(), {}
    if (saved := args.output / "faults.json").exists():
        values = json.loads(saved.read_bytes())
        campaign = Campaign([Start(**saved_start) for saved_start in values["starts"]], values["runs"], values["wrong"])
        reference, begin = values["reference"], begin - values["seconds"]
    else:
        alone = args.output / "alone" / "run"
        alone.parent.mkdir(parents=True, exist_ok=True)
        campaign.starts.append(start(alone, args, 1, True, "launcher", math.inf, END_SECONDS))
        reference = result_of(alone, tracked=True)
    while campaign.kills < args.kills and time.monotonic() - begin < 60 * args.minutes:
        one_run(campaign, campaign.runs + 1, args, reference)
        save(campaign, args, reference, begin)
        print(f"run {campaign.runs}: {campaign.kills} kills, {len(campaign.wrong)} wrong", file=sys.stderr, flush=True)
    print(f"{campaign.kills} kills over {campaign.runs} runs, each resumed until it was done: {len(campaign.wrong)} "
          "differ from the run that was left alone.\n")
    print("\n".join(table(["processes", "kills", "of the launcher", "after the first step",
                           "start to first step, s", "lost training at a kill, s"], lines_of(campaign))))
    for wrong in campaign.wrong:
        print(f"- {wrong}")
    sys.exit(bool(campaign.wrong))


if __name__ == "__main__":
    main()
