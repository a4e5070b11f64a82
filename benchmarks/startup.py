"""What starting costs: `mnist-dist --help`, and a run of one step beside importing the libraries that it stands on.

    python -m benchmarks.startup DATA_DIR [REPEATS]

Each figure is the wall time of a fresh process, in turns, seconds. "Opening the data" is `mnist_dist.data.load`, timed
in a process of its own. Prints Markdown.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.tables import cell, spread, table

OPEN = ("import sys, time; from mnist_dist.data import load; begin = time.perf_counter(); load('mnist', sys.argv[1]); "
        "print(time.perf_counter() - begin)")


def wall_seconds(words: list[str], cwd: str) -> float:
    """Of one fresh process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, cwd=cwd, env=child_environment(), stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main(data_dir: str, repeats: int = 7) -> None:
    """Measure in turns, print."""
    train = ["-m", "mnist_dist", "train", "--dataset", "mnist", "--data-dir", data_dir, "--max-steps", "1", "--wandb"]
    commands = {
        "`mnist-dist --help`": ["-m", "mnist_dist", "--help"],
        "`import torch, accelerate, torchvision`": ["-c", "import torch, accelerate, torchvision"],
        "`train --max-steps 1 --wandb disabled`": [*train, "disabled"],
        "`train --max-steps 1 --wandb offline`": [*train, "offline"],
    }
    taken: dict[str, list[float]] = {name: [] for name in (*commands, "opening the data")}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for name, words in commands.items():
                taken[name].append(wall_seconds(words, folder))
            opened = subprocess.run([sys.executable, "-c", OPEN, data_dir], check=True, capture_output=True, text=True,
                                    env=child_environment())
            taken["opening the data"].append(float(opened.stdout))
    spreads = {name: spread(seconds) for name, seconds in taken.items()}
    print("\n".join(table(["", "seconds"], [[name, cell(value)] for name, value in spreads.items()])))
    base = spreads["`import torch, accelerate, torchvision`"].median + spreads["opening the data"].median
    for wandb in ("disabled", "offline"):
        run = spreads[f"`train --max-steps 1 --wandb {wandb}`"].median
        print(f"A run of one step with W&B {wandb} takes {run / base:.2f} times the imports and opening the data.")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
