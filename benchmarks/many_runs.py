"""Many small runs at once: what it would save to train several seeds as one batched training.

    python -m benchmarks.many_runs DATA_DIR OUTPUT.json [--members 8] [--batch-sizes 1,32,200] [--on cpu|cuda]

The members are runs that differ in their seed. They are trained one after the other, as `mnist-dist train` does it; as
one compiled step over stacked weights (`torch.func.vmap`); and, on a CPU, one after the other on each core, each with
one thread. All in turns; a figure is microseconds per step of one member. First, in float64, each member of the stacked
training is compared with its own run. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.func import stack_module_state, vmap

from benchmarks.machine import describe
from mnist_dist.config import TrainConfig
from mnist_dist.data import ImageSets, load
from mnist_dist.disk.files import replace_json
from mnist_dist.processes.team import Team
from mnist_dist.tables import cell, spread, table
from mnist_dist.training.steps.compiled import CompiledStep
from mnist_dist.training.trainer import Trainer

TURNS = 7
MEMBER_STEPS = {1: 2000, 32: 800, 200: 300}  # in a turn, of all members together
LEARNING_RATE = 1e-3  # of the comparison in float64: far from where it began


class Orders:
    """The batches of several members, side by side in each row."""

    def __init__(self, members: Sequence[Trainer]) -> None:
        self.of = [member.batches for member in members]
        self.num_batches, self.passes, self.count = self.of[0].num_batches, 1, self.of[0].count

    def go_to(self, epoch: int, steps: range) -> None:
        """Each of them."""
        for batches in self.of:
            batches.go_to(epoch, steps)

    def rows(self, parts: int = 1) -> Tensor:
        """int64 [steps, members * longest]."""
        return torch.cat([batches.rows(parts) for batches in self.of], dim=1)


class StackedStep(CompiledStep):
    """A step of several members: their weights and moments are stacked, and so are their batches."""

    def __init__(self, members: Sequence[Trainer]) -> None:
        parts = replace(members[0].parts, batches=Orders(members), sums=members[0].sums.clone())
        self.members = len(members)
        stacks, _ = stack_module_state([member.module for member in members])
        self.stacks = {name: stack.detach() for name, stack in stacks.items()}
        super().__init__(parts)

    def _compile(self) -> None:
        self.weights = self.stacks
        self.state = {name: [torch.zeros_like(one) for one in (kept if name == "step" else self.stacks.values())]
                      for name, kept in self.state.items()}
        super()._compile()

    def _gradients(self, weights: dict[str, Tensor], rows_B: Tensor, count: Tensor) -> tuple[list[Tensor], Tensor]:
        def of_one(weights: dict[str, Tensor], rows_B: Tensor) -> tuple[list[Tensor], Tensor]:
            return CompiledStep._gradients(self, weights, rows_B, count)

        gradients, sums = vmap(of_one)(weights, rows_B.view(self.members, -1))
        return gradients, sums.sum(dim=0)


def members_of(sets: ImageSets, number: int, batch_size: int, on: str, **options: Any) -> list[Trainer]:
    """Trainers that differ in their seed."""
    team = Team(Accelerator(cpu=on == "cpu"), 60)
    return [Trainer(TrainConfig(batch_size=batch_size, compile="on", seed=seed, **options), team, sets)
            for seed in range(number)]


def run(step: CompiledStep, num_steps: int) -> float:
    """So many steps of the first epoch, to their end; the seconds that they take, without making the epoch's order."""
    step.begin(0, range(num_steps))
    begin = time.perf_counter()
    for index in range(num_steps):
        step.take(index)
    step.flush(num_steps)
    if step.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def recorded(step: CompiledStep) -> CompiledStep:
    """Ready to run."""
    if step.device.type == "cuda":
        step.record()
    return step


def largest_difference(sets: ImageSets, number: int, batch_size: int, on: str, num_steps: int = 20) -> float:
    """Between a weight of a member and the same one of its own run, in float64 after some steps."""
    members = members_of(sets, number, batch_size, on, dtype="float64", lr=LEARNING_RATE)
    stacked = recorded(StackedStep(members))
    run(stacked, num_steps)
    differences = []
    for index, member in enumerate(members):
        member.make_step()
        run(member.step, num_steps)
        differences += [(weight - stacked.weights[name][index]).abs().max().item()
                        for name, weight in member.module.named_parameters()]
    return max(differences)


def worker(sets: ImageSets, batch_size: int, num_steps: int) -> None:
    """A member with one thread: at each line on standard input takes its steps and prints the seconds."""
    torch.set_num_threads(1)
    [member] = members_of(sets, 1, batch_size, "cpu")
    member.make_step()
    for _ in sys.stdin:
        print(run(member.step, num_steps), flush=True)


def one_per_core(words: Sequence[str], cores: int) -> tuple[Callable[[], float], Callable[[], None]]:
    """What has a process on each core take its steps, and what ends them."""
    processes = [subprocess.Popen([sys.executable, "-m", "benchmarks.many_runs", *words], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                 for _ in range(cores)]

    def turn() -> float:
        for process in processes:
            print(file=process.stdin, flush=True)
        lines = [process.stdout.readline() for process in processes]
        if not all(lines):
            sys.exit("many_runs: error: a process of one thread has ended: see above")
        return max(map(float, lines))

    def end() -> None:
        for process in processes:
            process.communicate()

    return turn, end


def measure(sets: ImageSets, number: int, batch_size: int, on: str, words: Sequence[str]) -> dict[str, list[float]]:
    """Microseconds per step of one member, each way, in each turn."""
    member_steps = MEMBER_STEPS.get(batch_size, 300)
    num_steps = member_steps // number  # of each member
    members = members_of(sets, number, batch_size, on)
    stacked = recorded(StackedStep(members))
    members[0].make_step()
    ways = {"one after the other": lambda: sum(run(members[0].step, num_steps) for _ in range(number)),
            "stacked": lambda: run(stacked, num_steps)}
    cores, end = len(os.sched_getaffinity(0)), lambda: None
    steps = dict.fromkeys(ways, number * num_steps)
    if on == "cpu":
        each = member_steps // cores
        ways["one on each core"], end = one_per_core([*words, "--worker", f"{batch_size},{each}"], cores)
        steps["one on each core"] = each * cores
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, TURNS):
        for name, way in ways.items():
            seconds = way()
            if turn >= 0:
                found[name].append(1e6 * seconds / steps[name])
    end()
    return found


def main() -> int:
    """Compare, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_runs", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--batch-sizes", default="1,32,200")
    parser.add_argument("--on", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sets = load("mnist", given.data_dir)
    if given.worker:
        worker(sets, *map(int, given.worker.split(",")))
        return 0
    rows: list[dict[str, Any]] = []
    for size in map(int, given.batch_sizes.split(",")):
        difference = largest_difference(sets, given.members, size, given.on)
        ways = measure(sets, given.members, size, given.on, [given.data_dir, str(given.output)])
        rows.append({"batch_size": size, "largest_difference": difference, "microseconds": ways})
        replace_json(given.output, {"machine": describe(), "members": given.members, "rows": rows})
    lines = []
    for row in rows:
        first = row["microseconds"]["one after the other"]
        for way, values in row["microseconds"].items():
            saves = [1 - own / other for own, other in zip(values, first, strict=True)]
            lines.append([f"{row['batch_size']:,}", way, cell(spread(values)), "" if values is first
                          else cell(spread(saves))])
    print("\n".join(table(["batch", f"{given.members} members", "µs per step of a member", "saves"], lines)))
    print("\nlargest difference of a weight from the member's own run, float64:",
          ", ".join(f"{row['largest_difference']:.1e} at batch {row['batch_size']:,}" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
