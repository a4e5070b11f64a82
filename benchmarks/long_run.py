"""Memory, threads and open files of a long run: are they flat?

    python -m benchmarks.long_run DATA_DIR OUTPUT [--steps 100000]

Trains so many steps at batch 200 with the plain step on two processes, a checkpoint every 1,000 steps and W&B offline,
and looks at the main process once a second. Writes OUTPUT/long-run.json and OUTPUT/long-run.png; prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure

from benchmarks.faults import named
from benchmarks.machine import describe
from mnist_dist.disk.files import replace_json
from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.tables import number, table

OPTIONS = ["--dataset", "mnist", "--processes", "2", "--batch-size", "200", "--epochs", "1000000", "--compile", "off",
           "--checkpoint-every", "1000steps", "--wandb", "offline"]
STEPS_PER_EPOCH = 300
FIGURES = {"memory": "resident memory, MB", "threads": "threads", "files": "open files"}


def looked_at(steps: int, data_dir: str, folder: Path) -> list[dict[str, float]]:
    """What the main process used, once a second."""
    words = [sys.executable, "-m", "mnist_dist", "train", *OPTIONS, "--max-steps", str(steps), "--data-dir", data_dir,
             "--output-dir", str(folder)]
    found = []
    with subprocess.Popen(words, env=child_environment(), stdout=subprocess.DEVNULL) as launcher:
        while launcher.poll() is None:
            if (main := named(launcher, "rank 0")) and (folder / "metrics.jsonl").exists():
                lines = (folder / "metrics.jsonl").read_text().count("\n")
                try:
                    found.append({"step": lines * STEPS_PER_EPOCH, "memory": main.memory_info().rss / 1e6,
                                  "threads": main.num_threads(), "files": main.num_fds()})
                except psutil.Error:
                    break  # it has ended
            time.sleep(1.0)
    if launcher.returncode:
        raise SystemExit(f"exit status {launcher.returncode}")
    return found


def draw(found: Sequence[dict[str, float]], path: Path) -> None:
    """Each figure against the steps that are done."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(3, 1, sharex=True), FIGURES.items(), strict=True):
        axes.plot([one["step"] for one in found], [one[name] for one in found], color="#0072B2")
        axes.set_ylim(0, 1.2 * max(one[name] for one in found))
        axes.set_ylabel(label)
        axes.grid(color="#555555", alpha=0.25)
    axes.set_xlabel("optimizer steps done")
    figure.savefig(path, dpi=120, facecolor="white")


def line(name: str, found: Sequence[dict[str, float]]) -> list[str]:
    """The median in each fifth of the run."""
    parts = [found[len(found) * part // 5 : len(found) * (part + 1) // 5] for part in range(5)]
    return [FIGURES[name], *(number(statistics.median(one[name] for one in part)) for part in parts)]


def main() -> None:
    """Train, draw, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=100_000)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = looked_at(given.steps, given.data_dir, Path(scratch) / "run")
    values: dict[str, Any] = {"machine": describe(), "options": OPTIONS, "steps": given.steps, "seen": found}
    replace_json(given.output / "long-run.json", values)
    draw(found, given.output / "long-run.png")
    print("\n".join(table(["medians of the fifths of the run", "first", "second", "third", "fourth", "last"],
                          [line(name, found) for name in FIGURES])))


if __name__ == "__main__":
    main()
