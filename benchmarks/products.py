"""Which library multiplies fastest on this processor: MKL, oneDNN or OpenBLAS, at the sizes of a training step.

    python -m benchmarks.products DATA_DIR [OUT.json]

The five matrix products of a step, and then whole steps, at several batch sizes, with the threads of PyTorch, float32.
The ways take turns; a figure is the median over the turns. At the end: the entry of this processor for `ONEDNN_FROM`
(mnist_dist/training/cpu_products.py), the least multiplications from which a step with oneDNN is the faster one.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from mnist_dist.config import TrainConfig
from mnist_dist.data import ImageSets, load
from mnist_dist.processes.team import Team
from mnist_dist.record.environment import processor_family, processor_name
from mnist_dist.tables import Spread, cell, spread, table
from mnist_dist.training.steps import cpu_products
from mnist_dist.training.steps.compiled import PART
from mnist_dist.training.steps.step import Step
from mnist_dist.training.trainer import Trainer

INPUTS, HIDDEN, OUTPUTS = 784, 256, 10
BATCH_SIZES = (8, 16, 24, 32, 64, 128, 200, 500, 1000, 8192)
TURNS, TURN_SECONDS, PAUSE_SECONDS, STEP_TURNS = 7, 0.01, 0.2, 12
KINDS = {"off": "plain", "on": "compiled"}  # of steps, by --compile
MKL, ONEDNN, OPENBLAS = "MKL", "oneDNN", "OpenBLAS"  # of PyTorch, of PyTorch, of numpy
Way = TypeVar("Way")


def libraries() -> list[str]:
    """The libraries on this machine; OpenBLAS is the last."""
    return [MKL, *[ONEDNN] * cpu_products.has_onednn(), OPENBLAS]


class Product(NamedTuple):
    """left x right^T, which goes to `result` if the library can do so."""

    name: str
    left_MK: Tensor
    right_NK: Tensor
    result_MN: Tensor

    @property
    def multiplications(self) -> int:
        """M N K"""
        return self.left_MK.numel() * len(self.right_NK)

    def by(self, library: str) -> Callable[[], Any]:
        """The call of one of the libraries."""
        left, right, result = self.left_MK, self.right_NK, self.result_MN
        if library == MKL:
            return lambda: torch.mm(left, right.t(), out=result)
        if library == ONEDNN:
            return lambda: cpu_products.product(left, right)
        arrays = left.numpy(), right.numpy().T, result.numpy()
        return lambda: np.dot(arrays[0], arrays[1], out=arrays[2])


def step_products(batch_size: int, device: torch.device) -> list[Product]:
    """A step's five: two forward, two weight gradients, and the gradient of the hidden layer. Gradients of weights have
    both operands transposed, as autograd has them.
    """

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device) / 100

    images_BI, hidden_BH, logits_BO = (matrix(batch_size, size) for size in (INPUTS, HIDDEN, OUTPUTS))
    hidden_gradient_BH, logits_gradient_BO = matrix(batch_size, HIDDEN), matrix(batch_size, OUTPUTS)
    w1_HI, w2_OH, w1_gradient_HI, w2_gradient_OH = (matrix(*shape) for shape in 2 * [(HIDDEN, INPUTS),
                                                                                     (OUTPUTS, HIDDEN)])
    return [Product("first layer", images_BI, w1_HI, hidden_BH),
            Product("second layer", hidden_BH, w2_OH, logits_BO),
            Product("gradient of the second layer's weights", logits_gradient_BO.t(), hidden_BH.t(), w2_gradient_OH),
            Product("gradient of the hidden layer", logits_gradient_BO, w2_OH.t(), hidden_gradient_BH),
            Product("gradient of the first layer's weights", hidden_gradient_BH.t(), images_BI.t(), w1_gradient_HI)]


def seconds_per_call(calls: Mapping[Way, Callable[[], Any]]) -> dict[Way, Spread]:
    """Of each call, in turns, over warm caches. OpenBLAS comes last: its threads spin for long after a call, so that
    each turn begins with a pause. Threads that wake up after it may begin on one core, so the first call is made for
    some time before.
    """

    def warm_up(call: Callable[[], Any], seconds: float) -> None:
        begin = time.perf_counter()
        while time.perf_counter() < begin + seconds:
            call()

    def turn(call: Callable[[], Any], number: int) -> float:
        warm_up(call, TURN_SECONDS)
        begin = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - begin) / number

    numbers = {name: max(1, round(TURN_SECONDS / min(turn(call, 3) for _ in range(3)))) for name, call in calls.items()}
    turns = []
    for _ in range(TURNS):
        time.sleep(PAUSE_SECONDS)
        warm_up(next(iter(calls.values())), PAUSE_SECONDS)
        turns.append({name: turn(call, numbers[name]) for name, call in calls.items()})
    return {name: spread([each[name] for each in turns]) for name in calls}


def fastest(batch_size: int) -> tuple[list[str], Callable[[], None]]:
    """The fastest way on the CPU to multiply a step's products: the library of each, and the call of all of them. Each
    product is MKL's or oneDNN's, which use the same threads, or all are OpenBLAS's, which starts other threads.
    """
    all_five = step_products(batch_size, torch.device("cpu"))
    mixed = []
    for product in all_five:
        seconds = seconds_per_call({library: product.by(library) for library in libraries()[:-1]})
        mixed.append(min(seconds, key=lambda library: seconds[library].median))
    ways = {tuple(mixed): in_turn(all_five, mixed)}
    ways[(OPENBLAS,) * len(all_five)] = in_turn(all_five, [OPENBLAS] * len(all_five))
    seconds = seconds_per_call(ways)
    best = min(ways, key=lambda way: seconds[way].median)
    return list(best), ways[best]


def in_turn(five: Sequence[Product], libraries: Sequence[str]) -> Callable[[], None]:
    """The call of all products, each by its library."""
    calls = [product.by(library) for product, library in zip(five, libraries, strict=True)]

    def run() -> None:
        for call in calls:
            call()

    return run


def gflops(batch_size: int = 1000) -> dict[str, float]:
    """Of each library, at the first layer's product."""
    product = step_products(batch_size, torch.device("cpu"))[0]
    seconds = seconds_per_call({library: product.by(library) for library in libraries()})
    return {library: 2e-9 * product.multiplications / each.median for library, each in seconds.items()}


def measure_products(batch_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Of each product of a step the seconds of each library: median, minimum and maximum."""
    measured = []
    for batch_size in batch_sizes:
        for product in step_products(batch_size, torch.device("cpu")):
            seconds = seconds_per_call({library: product.by(library) for library in libraries()})
            measured.append({"batch_size": batch_size, "product": product.name,
                             "multiplications": product.multiplications,
                             "seconds": seconds})
    return measured


def trainer(sets: ImageSets, batch_size: int, compile: str, **options: Any) -> Trainer:
    """A fresh one with its step, in one process on the CPU."""
    config = TrainConfig(batch_size=batch_size, compile=compile, **options)
    made = Trainer(config, Team(Accelerator(cpu=True), 60), sets)
    made.make_step()
    return made


def measure_steps(sets: ImageSets, batch_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The seconds of a step, plain and compiled, with PyTorch's products and with oneDNN's for the first layer's. Each
    turn has all batch sizes, because a machine can be in another state some minutes later.
    """
    cells = {}
    for batch_size, (compile, kind) in itertools.product(batch_sizes, KINDS.items()):
        rules = {MKL: {}, ONEDNN: {processor_family(): {kind: batch_size * INPUTS * HIDDEN}}}
        for library, rule in rules.items():
            with patch.object(cpu_products, "ONEDNN_FROM", rule):
                cells[batch_size, kind, library] = trainer(sets, batch_size, compile).step
    seconds = {at: list[float]() for at in cells}
    for turn in range(STEP_TURNS + 1):
        for at, step in cells.items():
            seconds[at].append(seconds_per_step(step, turn, max(16, min(1000, 30_000 // at[0]))))
    return [{"batch_size": batch_size, "kind": kind, "multiplications": batch_size * INPUTS * HIDDEN,
             "seconds": {library: spread(seconds[batch_size, kind, library][1:])  # the first turn warms up
                         for library in (MKL, ONEDNN)}}
            for batch_size, kind in itertools.product(batch_sizes, KINDS.values())]


def seconds_per_step(step: Step, epoch: int, number: int) -> float:
    """The mean over the first `number` steps of the epoch, or over all if it has fewer."""
    number = min(number, step.batches.num_batches)  # type: ignore[attr-defined]  # every kind has it
    step.begin(epoch, range(number))
    begin = time.perf_counter()
    for index in range(number):
        step.take(range(index, index + 1))
    step.flush(number)
    return (time.perf_counter() - begin) / number


def least(steps: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """By kind of step the least multiplications from which it is faster with oneDNN at every batch size; a kind that is
    not at the largest has no entry. The fastest turn counts, which other processes disturb least.
    """
    entry = {}
    for kind in KINDS.values():
        for step in sorted((step for step in steps if step["kind"] == kind), key=lambda step: -step["multiplications"]):
            if step["seconds"][ONEDNN][1] >= step["seconds"][MKL][1]:  # the minima
                break
            entry[kind] = step["multiplications"]
    return entry


def microseconds(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """Cells of a table."""
    return [cell(Spread(*(1e6 * value for value in values))) for values in seconds.values()]


def main(data_dir: str, output: str | None = None) -> None:
    """Measure, print two tables, and write the measurements."""
    of_products = measure_products(BATCH_SIZES)
    # a compiled step takes a larger batch in parts
    of_steps = measure_steps(load("mnist", data_dir), [size for size in BATCH_SIZES if size <= PART])
    print(f"Microseconds, median (minimum to maximum); {torch.get_num_threads()} threads, {processor_name()} "
          f"{processor_family()}, torch {torch.__version__}, numpy {np.__version__}\n")
    print("\n".join(table(["batch", "product", "million multiplications", MKL, ONEDNN, OPENBLAS], [
        [str(each["batch_size"]), each["product"], f"{each['multiplications'] / 1e6:.3g}",
         *microseconds(each["seconds"])] for each in of_products])))
    print("\n".join(table(["batch", "step", "million multiplications", MKL, ONEDNN], [
        [str(each["batch_size"]), each["kind"], f"{each['multiplications'] / 1e6:.3g}",
         *microseconds(each["seconds"])] for each in of_steps])))
    print(f"ONEDNN_FROM of this processor: {processor_family()}: {least(of_steps)}")
    if output:
        Path(output).write_text(json.dumps({
            "processor": processor_name(), "family": processor_family(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "numpy": np.__version__, "onednn_from": least(of_steps),
            "products": of_products, "steps": of_steps,
        }, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
