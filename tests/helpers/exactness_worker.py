"""Trains many small configurations in one launch and saves what each came to; run by test_exactness.py.

    run_forked([DATA_DIR, OUTPUT_DIR, CASES_JSON], size=SIZE, target="exactness_worker:main", …)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from support import take_steps

from mnist_dist.config import Every, TrainConfig
from mnist_dist.data import Images, ImageSets, load
from mnist_dist.processes.launch_environment import read_launch
from mnist_dist.processes.team import join
from mnist_dist.stopwatch import Stopwatch
from mnist_dist.training.pauses import PauseSchedule
from mnist_dist.training.trainer import Trainer

EPOCHS = 2


def main(argv: Sequence[str]) -> None:
    """Each case: options of training, and "images": how many of the training images there are."""
    data_dir, output_dir, cases = argv
    team = join(read_launch(), timeout_s=60, mixed_precision="no", dynamo_backend="no")
    sets = load("mnist", data_dir)
    for name, options in json.loads(cases).items():
        count = options.pop("images")
        some = ImageSets("small", Images(sets.train.images[:count], sets.train.labels[:count]), sets.test)
        trainer = Trainer(TrainConfig(lr=1e-3, **{"compile": "off", **options}), team, some)
        trainer.make_step()
        schedule = PauseSchedule(Every(0, "epochs"), trainer.batches.num_batches, team)
        steps = range(trainer.batches.num_batches)
        metrics = []
        for epoch in range(EPOCHS):
            take_steps(trainer, epoch, steps, Stopwatch(team.synchronize), schedule)
            metrics.append({"train_loss": trainer.train_loss(epoch, len(steps)), **trainer.evaluate()})
            trainer.sums.zero_()
        if team.is_main:
            save_file(trainer.module.state_dict(), Path(output_dir, f"{name}.safetensors"))
            Path(output_dir, f"{name}.json").write_text(json.dumps({
                "steps": EPOCHS * len(steps), "processes": team.size, "epochs": metrics,
            }))
        team.accelerator.free_memory()
    team.end()
