"""What a step's time is spent on, and the cost of other kinds of step: the measurements behind docs/performance.md.

    python -m benchmarks.variants DATA_DIR BATCH_SIZE [NUM_STEPS]

Every way trains the same model on the same batches in this process, in turns; a figure is the median over the turns of
the mean microseconds per step. The parts below them are timed by themselves. One process, on the CPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from benchmarks.limit import adam
from benchmarks.peers.pytorch import step_on
from benchmarks.products import fastest, trainer
from mnist_dist.config import Every
from mnist_dist.data import Images, ImageSets, load, scale
from mnist_dist.tables import cell, spread, table
from mnist_dist.training.metrics import Stopwatch
from mnist_dist.training.pauses import Pacer
from mnist_dist.training.steps import compiled
from mnist_dist.training.steps.compiled import CompiledStep, compile_once, inductor_options
from mnist_dist.training.steps.graph_pass import GraphPass
from mnist_dist.training.steps.plain import loss_sum
from mnist_dist.training.trainer import Trainer

TURNS = 7
PASS = "post_grad_custom_pre_pass"  # the option of inductor that has our pass
Way = Callable[[list[Tensor]], None]  # takes a step on each of these rows of indices


class WithoutBlocks(GraphPass):
    """Products with the weights as MKL shares them out."""

    def _cuts(self, *_: Any, **__: Any) -> bool:
        return False


class WithoutLoops(GraphPass):
    """Small products by MKL, but for one sample."""

    def _is_small(self, *_: Any) -> bool:
        return False


class WithDivisions(GraphPass):
    """Adam's loop divides twice for a weight."""

    def _replace_divisions(self, graph: Any) -> None:
        pass


def one_by_one(step: Callable[..., Any], *more: Any) -> Way:
    """A way that calls `step` with each row."""
    def run(rows: list[Tensor]) -> None:
        for row in rows:
            step(row, *more)
    return run


def plain(made: Trainer, fetch: Callable[[Images, Tensor], Any] = Images.__getitems__) -> Way:
    """The reference, with its DataLoader."""
    def run(rows: list[Tensor]) -> None:
        with patch.object(Images, "__getitems__", fetch):
            made.step.begin(0, range(len(rows)))
            for index in range(len(rows)):
                made.step.take(index)
    return run


def plain_through_accelerate(made: Trainer) -> Way:
    """The reference, with Accelerate's wrapper of the optimizer."""
    made.step.optimizer = made.optimizer
    return plain(made)


def in_loop(made: Trainer) -> Way:
    """The trainer's own loop, with its clock and sums."""
    pacer = Pacer(Every(0, "steps"), made.batches.num_batches, made.team)

    def run(rows: list[Tensor]) -> None:
        list(made.steps(0, range(len(rows)), Stopwatch(lambda: None), pacer))
    return run


def beside_fused_adam(step: CompiledStep) -> Way:
    """Compiled as far as the gradients; then the optimizer's fused kernel, which inductor cannot have inside."""
    gradients = [torch.zeros_like(weight) for weight in step.weights.values()]

    def set_gradients(rows_B: Tensor, count: Tensor) -> Tensor:
        found, total = step._gradients(step.weights, rows_B, count)
        for kept, gradient in zip(gradients, found, strict=True):
            kept.copy_(gradient)
        return total

    first = compile_once(set_gradients, step.rows[0], step.full, onednn_from=step.onednn_from)
    weights = list(step.weights.values())

    def run(rows: list[Tensor]) -> None:
        for row in rows:
            first(row, step.full)
            torch._foreach_add_(step.state["step"], 1)
            torch._fused_adam_(weights, gradients, step.state["exp_avg"], step.state["exp_avg_sq"], [],
                               step.state["step"], lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8,
                               amsgrad=False, maximize=False)
    return run


def flat_weights(step: CompiledStep) -> Way:
    """All weights, and so all gradients and moments, in one buffer."""
    shapes = {name: weight.shape for name, weight in step.weights.items()}
    sizes = [weight.numel() for weight in step.weights.values()]
    flat = torch.cat([weight.flatten() for weight in step.weights.values()])
    step.weights = {"flat": flat}
    step.state = {"step": [torch.zeros(())], **{name: [torch.zeros_like(flat)] for name in ("exp_avg", "exp_avg_sq")}}

    def whole(rows_B: Tensor, count: Tensor) -> Tensor:
        labels, images = step.images.labels[rows_B], step.images.images[rows_B]

        def mean_loss(flat: Tensor) -> Tensor:
            parts = {name: part.view(shape) for (name, shape), part in
                     zip(shapes.items(), flat.split(sizes), strict=True)}
            return loss_sum(lambda x: functional_call(step.module, parts, (x,)), images, labels, step.dtype) / count

        gradient, loss = grad_and_value(mean_loss)(flat)
        step._adam([gradient])
        return loss

    return one_by_one(compile_once(whole, step.rows[0], step.full, onednn_from=step.onednn_from), step.full)


def several_per_call(step: CompiledStep, number: int) -> Way:
    """So many steps unrolled into one compiled function."""
    def steps(rows_KB: Tensor, count: Tensor) -> Tensor:
        return torch.stack([step._whole_step(rows, count) for rows in rows_KB.unbind()])

    together = compile_once(steps, torch.stack(step.rows[:number]), step.full, onednn_from=step.onednn_from)

    def run(rows: list[Tensor]) -> None:
        for rows_KB in torch.stack(rows).split(number):
            together(rows_KB, step.full)
    return run


def ways(sets: ImageSets, batch_size: int, num_steps: int) -> Iterator[tuple[str, Way]]:
    """Every way of taking a step, compiled."""
    def fresh() -> CompiledStep:
        step = trainer(sets, batch_size, "on").step
        step.begin(0, range(step.batches.num_batches))
        return step

    count = num_steps * batch_size
    epoch = sets._replace(train=Images(sets.train.images[:count], sets.train.labels[:count]))  # of so many steps
    step = fresh()
    yield "the whole step compiled, called directly: `--compile on`", one_by_one(step._whole, step.full)
    yield "plain: `--compile off`", plain(trainer(epoch, batch_size, "off"))
    yield "plain, with Accelerate's wrapper of Adam", plain_through_accelerate(trainer(epoch, batch_size, "off"))
    yield "plain, with `images[rows]` for a batch", plain(
        trainer(epoch, batch_size, "off"), lambda self, rows: (self.images[rows], self.labels[rows]))
    yield "hand-written PyTorch", one_by_one(step_on(scale(sets.train.images.flatten(1)), sets.train.labels))
    yield "this step in the trainer's loop", in_loop(trainer(epoch, batch_size, "on"))
    step = fresh()
    least = step.onednn_from
    through = torch.compile(step._whole_step, dynamic=False, fullgraph=True, options=inductor_options(least))
    yield "called through torch.compile's own entry", one_by_one(torch.no_grad()(through), step.full)
    yield "Adam's fused kernel beside compiled gradients", beside_fused_adam(fresh())
    yield "all weights in one flat buffer", flat_weights(fresh())
    for number in (4, 8):
        yield f"{number} steps per call", several_per_call(fresh(), number)
    for what, without in (
            ("bias corrections computed for every vector (inductor's default)", {"realize_opcount_threshold": 30}),
            ("images scaled in two passes", {"realize_opcount_threshold": 4}),
            ("shapes checked at each call (inductor's default)", {"size_asserts": True}),
            ("products as MKL shares them out to the threads", {PASS: WithoutBlocks(least)}),
            ("small products by MKL, but for one sample", {PASS: WithoutLoops(least)}),
            ("Adam's loop divides twice for a weight", {PASS: WithDivisions(least)}),
            ("the graph as it is", {PASS: None})):
        with patch.dict(compiled.INDUCTOR_OPTIONS, without):
            step = fresh()
        yield what, one_by_one(step._whole, step.full)


def microseconds(run: Callable[[], Any], calls: int) -> float:
    """The mean of so many calls."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return 1e6 * (time.perf_counter() - begin) / calls


def main(data_dir: str, batch_size: int, num_steps: int = 0) -> None:
    """Measure in turns, and print two tables."""
    sets = load("mnist", data_dir)
    num_steps = num_steps or max(24, min(2000, 60_000 // batch_size) // 8 * 8)
    order = torch.randperm(len(sets.train), generator=torch.Generator().manual_seed(0))
    rows = list(order[: num_steps * batch_size].view(num_steps, batch_size).unbind())
    device, found = torch.device("cpu"), dict(ways(sets, batch_size, num_steps))
    parts = {"matrix products of the step's shapes, by the fastest library": fastest(batch_size)[1],
             "Adam's fused kernel, over warm caches": adam(device)}
    taken: dict[str, list[float]] = {name: [] for name in (*found, *parts)}
    for _ in range(TURNS):
        for name, way in found.items():
            taken[name].append(microseconds(lambda way=way: way(rows), 1) / num_steps)
        for name, part in parts.items():
            taken[name].append(microseconds(part, 500))
    spreads = {name: spread(values[1:]) for name, values in taken.items()}  # the first turn warms up
    first = statistics.median(taken[next(iter(found))][1:])
    print(f"Microseconds per step at batch {batch_size}, median (minimum to maximum) of {TURNS - 1} turns of "
          f"{num_steps} steps; {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("\n".join(table(["way", "microseconds", "ours takes of it"],
                          [[name, cell(spreads[name]), f"{first / spreads[name].median:.2f}"] for name in spreads])))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
