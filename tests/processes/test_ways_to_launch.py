"""Every way to launch, each with 1, 2 and 3 CPU processes: the asked number runs, in one folder, with one W&B run."""

from __future__ import annotations

import sys

import pytest
from support import ROOT, TORCHRUN, TRAIN, check_one_run, run

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
CONFIG = ["--config_file", ROOT / "accelerate_config.yaml"]
WAYS = {
    "python": ([sys.executable], 1),
    "accelerate": (ACCELERATE, 1),
    "accelerate --cpu -n 1": ([*ACCELERATE, "--cpu", "--num_processes", "1"], 1),
    "accelerate -n 2": ([*ACCELERATE, "--num_processes", "2"], 2),
    "accelerate --cpu -n 3": ([*ACCELERATE, "--cpu", "--num_processes=3"], 3),
    "accelerate --multi_gpu -n 2": ([*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=0"], 2),
    "config": ([*ACCELERATE, *CONFIG], 1),
    "config -n 2": ([*ACCELERATE, *CONFIG, "--num_processes", "2"], 2),
    "config -n 3": ([*ACCELERATE, *CONFIG, "--num_processes", "3"], 3),
    "torchrun 1": ([*TORCHRUN, "--nproc-per-node=1"], 1),
    "torchrun 2": ([*TORCHRUN, "--nproc-per-node=2"], 2),
    "torchrun 3": ([*TORCHRUN, "--nproc-per-node=3"], 3),
}


LONG = ("accelerate --multi_gpu -n 2", "config", "config -n 3", "torchrun 2")
FAULTS = ("accelerate -n 2", "accelerate --cpu -n 1", "accelerate --cpu -n 3", "config -n 2", "torchrun 1",
          "torchrun 3")


@pytest.mark.parametrize("way", [
    pytest.param(way, marks=[*[pytest.mark.long] * (way in LONG), *[pytest.mark.faults] * (way in FAULTS)])
    for way in WAYS
])
def test_the_asked_number_of_processes(way, no_hint, small_dir, tmp_path):
    command, size = WAYS[way]
    done = run([*command, TRAIN, "--data-dir", small_dir, "--max-steps", 3, "--batch-size", 50], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_one_run(tmp_path, size)
    assert done.stdout.count("writing to") == 1, "one process speaks"
