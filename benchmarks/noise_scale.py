"""The gradient noise scale: is it right, which estimator is better, and what does it cost?

    python -m benchmarks.noise_scale DATA_DIR [TURNS]

Weights are those after one epoch of batch 200. The truth is from the gradients of all 60,000 single samples. Each
estimate is from one epoch at these weights, which stay as they are. Cost: steps with and without, in turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.variants import trainer
from mnist_dist.data import Images, ImageSets, load
from mnist_dist.tables import cell, number, spread, table
from mnist_dist.training.model import MLP
from mnist_dist.training.noise_scale import EVERY, EVERY_SAMPLES, NoiseScale, SampleNorms, gradient_norm, noise_scale
from mnist_dist.training.steps.plain import loss_sum

BATCH, ORDERS = 200, 20
COST_BATCHES, BLOCK_SECONDS = (32, 200, 1000), 0.25


def truth(model: MLP, train: Images, chunk: int = 100) -> float:
    """tr(S) / |G|^2 from the gradient of every sample."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return loss_sum(lambda x: functional_call(model, weights, (x,)), image[None], label[None], torch.float32)

    squares, total = 0.0, torch.zeros(sum(weight.numel() for weight in weights.values()), dtype=torch.float64)
    for images, labels in zip(train.images.split(chunk), train.labels.split(chunk), strict=True):
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
        rows = torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)
        squares += float(rows.square().sum(dtype=torch.float64))
        total += rows.sum(dim=0, dtype=torch.float64)
    signal = float((total / len(train)).square().sum())
    return (squares / len(train) - signal) / signal


def one_epoch(model: MLP, train: Images, order: Tensor) -> tuple[NoiseScale, NoiseScale, NoiseScale]:
    """Estimates from an epoch: from single samples in some steps, as in the plain step; the same in every step; and
    in every step from the gradients of two halves of the batch, as two processes have them.
    """
    norms, weights = SampleNorms(model), list(model.parameters())
    rows = []
    for batch in order.split(BATCH):
        halves: list[Tensor] = []
        samples = 0.0
        for half in batch.chunk(2):
            with norms.measuring():
                loss = loss_sum(model, train.images[half], train.labels[half], torch.float32) / BATCH
                gradients = torch.autograd.grad(loss, weights)
            samples += float(norms.total)
            halves.append(torch.cat([gradient.flatten() for gradient in gradients]))
        local = statistics.fmean(float(gradient_norm([2 * half])) for half in halves)
        rows.append((samples, float(gradient_norm([halves[0] + halves[1]])), local))
    single, whole, local = zip(*rows, strict=True)
    counts = [BATCH] * len(rows)
    # two halves are like a batch of two samples, each with the variance of a half: the scale is in halves
    halved = noise_scale([value / 2 for value in local], whole, [2] * len(rows))
    some = [[value if step % every == 0 else 0.0 for step, value in enumerate(values)]
            for values, every in ((single, EVERY_SAMPLES), (whole, EVERY))]
    return (noise_scale(*some, counts), noise_scale(single, whole, counts),
            NoiseScale(*(value and value * BATCH / 2 for value in halved)))


def cost(sets: ImageSets, batch: int, compile: str, turns: int) -> list[float]:
    """The time of a step with the noise scale over that without, less 1: of each turn."""
    pair = [trainer(sets, batch, compile, noise_scale=wanted) for wanted in (False, True)]
    taken: list[list[float]] = [[], []]
    steps = len(sets.train) // batch
    count = max(8, round(BLOCK_SECONDS / (1e-3 + 4e-6 * batch)) // 8 * 8)
    for turn in range(turns + 1):
        for which, one in enumerate(pair):
            one.step.begin(turn, range(steps))
            begin = time.perf_counter()
            for step in range(min(count, steps)):
                one.step.take(step)
            taken[which].append(time.perf_counter() - begin)
            one.step.flush(min(count, steps))
    return [after / before - 1 for before, after in zip(*taken, strict=True)][1:]


def lines_of(truth: float, named: dict[str, Sequence[NoiseScale]]) -> list[list[str]]:
    """A line for each estimator."""
    lines = []
    for name, found in named.items():
        known = [one for one in found if one.noise_scale is not None]
        values = [one.noise_scale for one in known]
        held = sum(one.noise_scale_low <= truth <= one.noise_scale_high for one in known)
        lines.append([name, cell(spread(values)), f"{100 * statistics.stdev(values) / truth:.0f} %",
                      f"{sum(abs(value / truth - 1) <= 0.2 for value in values)} of {len(found)}",
                      f"{held} of {len(known)}"])
    return lines


def main(data_dir: str, turns: int = 20) -> None:
    """Measure, and print two tables."""
    sets = load("mnist", data_dir)
    made = trainer(sets, BATCH, "off")
    made.step.begin(0, range(made.batches.num_batches))
    for step in range(made.batches.num_batches):
        made.step.take(step)
    true = truth(made.module, sets.train)
    generator = torch.Generator().manual_seed(1)
    epochs = [one_epoch(made.module, sets.train, torch.randperm(len(sets.train), generator=generator))
              for _ in range(ORDERS)]
    names = ("single samples, as the plain step", "single samples, every step", "two halves, every step")
    print(f"After one epoch at batch {BATCH} the noise scale is {number(true)}. {ORDERS} estimates, each from an epoch "
          "in another order:\n")
    print("\n".join(table(["estimate from", "median (minimum to maximum)", "standard deviation", "within 20 %",
                           "interval holds it"], lines_of(true, dict(zip(names, zip(*epochs, strict=True),
                                                                         strict=True))))))
    lines = []
    for compile in ("off", "on"):
        for batch in COST_BATCHES:
            costs = sorted(100 * each for each in cost(sets, batch, compile, turns))
            quarter = len(costs) // 4
            lines.append([f"--compile {compile}", f"{batch}", f"{statistics.median(costs):+.1f} %",
                          f"{costs[quarter]:+.1f} to {costs[-quarter - 1]:+.1f} %"])
    print(f"What it adds to a step, {turns} turns, {torch.get_num_threads()} threads:\n")
    print("\n".join(table(["step", "batch", "median", "middle half of the turns"], lines)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
