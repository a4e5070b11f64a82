"""Trains with the fused step in Triton's interpreter.

    python fused_worker.py compare OPTIONS      the fused step and the plain one, beside the plain one in float64
    python fused_worker.py train ARGUMENTS      `mnist-dist train ARGUMENTS`, which finds a GPU for --compile fused

OPTIONS is JSON: options of training, and `hidden`, `images_of`, `programs` (0: one for each tile), `rows` of a block
and `cut`, the steps of a launch. It prints JSON: how far the weights and the losses of both steps in float32 are from
those in float64, relative to the largest, the steps taken, and the SHA-256 of the fused step's weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "ACCELERATE_USE_CPU": "true"}  # before Triton is imported

import torch
from triton_on_cpu import mend_interpreter

from mnist_dist.cli import main
from mnist_dist.config import TrainConfig
from mnist_dist.data import Images, ImageSets
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.team import join
from mnist_dist.training import trainer as trainers
from mnist_dist.training.model import MLP
from mnist_dist.training.steps import fused
from mnist_dist.training.steps.plain import PlainStep


class Interpreted(fused.FusedStep):
    """The stages one after the other, because the interpreter has no barrier between programs."""

    programs_at_once = 10**6

    def _multiprocessors(self) -> int:
        return self.programs_at_once

    def _launch(self, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            for stage in (1, 2, 3):
                self._run(step, 1, STAGE=stage)


def images(number: int) -> Images:
    """Noise, mostly black."""
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (number, 1, 28, 28), generator=random)
    pixels *= torch.rand(number, 1, 28, 28, generator=random) < 0.2
    return Images(pixels.to(torch.uint8), torch.randint(0, 10, (number,), generator=random))


def compare(hidden: int, images_of: int, programs: int, rows: int, cut: int, **options: Any) -> None:
    """Train with the fused step, and twice with the plain one."""
    Interpreted.programs_at_once = programs or Interpreted.programs_at_once
    fused.MOST_ROWS, fused.FIRST_LAUNCH = rows, cut
    trainers.MLP = lambda: MLP((hidden,))  # type: ignore[assignment, misc]
    data = images(images_of)
    team = join(Launch(use_cpu=True), timeout_s=20.0)
    trained = []
    for kind, dtype in (("fused", "float32"), ("plain", "float32"), ("plain", "float64")):
        config = TrainConfig(compile="off", dtype=dtype, **options)
        trainer = trainers.Trainer(config, team, ImageSets("noise", data, data))
        step: Any = (Interpreted if kind == "fused" else PlainStep)(trainer.parts)
        losses = []
        for epoch in range(config.epochs):
            trainer.sums.zero_()
            step.begin(epoch, range(trainer.batches.num_batches))
            step.take(range(trainer.batches.num_batches))
            losses.append(trainer.sums[0].clone())
        weights = torch.cat([weight.detach().double().flatten() for weight in trainer.module.parameters()])
        counts = {float(state["step"]) for state in trainer.optimizer.optimizer.state.values()}
        trained.append((weights, torch.cat(losses), counts))
    *ours, (weights, sums, counts) = trained
    print(json.dumps({
        "weights": [float((other - weights).abs().max() / weights.abs().max()) for other, _, _ in ours],
        "losses": [float((other - sums).abs().max() / sums.abs().max()) for _, other, _ in ours],
        "steps": [sorted(counts) for _, _, counts in trained],
        "sha256": hashlib.sha256(ours[0][0].numpy().tobytes()).hexdigest(),
    }))


def train(arguments: list[str]) -> int:
    """`mnist-dist train` with the fused step in the interpreter."""
    from mnist_dist.training import steps

    trainers.MLP = lambda: MLP((16,))  # type: ignore[assignment, misc]
    if os.environ.get("HAS_GPU") != "no":
        fused.why_not = trainers.why_not = lambda parts: None  # type: ignore[assignment]
    steps.fused.FusedStep = Interpreted  # type: ignore[misc]
    return main(["train", *arguments])


if __name__ == "__main__":
    mend_interpreter()
    if sys.argv[1] == "train":
        sys.exit(train(sys.argv[2:]))
    compare(**json.loads(sys.argv[2]))
