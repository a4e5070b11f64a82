"""What checkpoints cost a run: epochs of batch 200 with one every 100 steps, and without, in turns.

    python -m benchmarks.checkpoint_cost DATA_DIR OUTPUT.json [--turns 40]

One process. An epoch is timed from before its first step, or the checkpoint before it, until its last checkpoint is
whole; its 20 epochs of history are real. Writes every time to OUTPUT.json, and prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.variants import trainer
from mnist_dist.config import Every
from mnist_dist.data import ImageSets, load
from mnist_dist.disk.files import replace_json
from mnist_dist.record.checkpoint import CheckpointWriter
from mnist_dist.tables import cell, spread, table
from mnist_dist.training.metrics import Stopwatch
from mnist_dist.training.pauses import Pacer

BATCH, STEPS, HISTORY = 200, 100, 20
STATE = {"records": HISTORY * [2000 * "x"]}  # an epoch's line has 2,000 characters


def epochs(sets: ImageSets, compile: str, turns: int, root: Path) -> dict[str, Any]:
    """Seconds of the epochs without checkpoints and with them, and what each checkpoint took."""
    made = trainer(sets, BATCH, compile)
    num_batches = made.batches.num_batches
    pacers = [Pacer(Every(number, "steps"), num_batches, made.team) for number in (0, STEPS)]
    writer = CheckpointWriter(root, keep=2)
    taken: list[list[float]] = [[], []]
    for turn in range(turns + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            begin = time.perf_counter()
            if which:
                writer.write(turn * num_batches, made.tensors(), STATE)
            for done in made.steps(0, range(num_batches), Stopwatch(made.team.synchronize), pacers[which]):
                made.train_loss(0, done)
                writer.write(turn * num_batches + done, made.tensors(), STATE)
            writer.wait()
            taken[which].append(time.perf_counter() - begin)
            made.sums.zero_()
    without, with_them = (one[1:] for one in taken)  # the first warms up
    return {"compile": compile, "without": without, "with": with_them, "pauses": writer.pauses, "whole": writer.delays}


def line(row: dict[str, Any]) -> list[str]:
    """One kind of step: the extra time, turn by turn, and the times of a checkpoint."""
    extra = [100 * (b / a - 1) for a, b in zip(row["without"], row["with"], strict=True)]
    low, high = statistics.quantiles(extra, n=4)[::2]
    return ["compiled" if row["compile"] == "on" else "plain", cell(spread(row["without"])), cell(spread(row["with"])),
            f"{statistics.median(extra):.1f} ({low:.1f} to {high:.1f})",
            *(cell(spread([1000 * seconds for seconds in row[name]])) for name in ("pauses", "whole"))]


def main() -> None:
    """Measure both kinds of step, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_cost", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--turns", type=int, default=40)
    given = parser.parse_args()
    sets, rows = load("mnist", given.data_dir), []
    for compile in ("on", "off"):
        with tempfile.TemporaryDirectory(dir=given.output.parent) as scratch:
            rows.append(epochs(sets, compile, given.turns, Path(scratch)))
    replace_json(given.output, {"machine": describe(), "rows": rows})
    head = ["step", "an epoch without, s", "with 3, s", "more, % (middle half)", "the training waits, ms",
            "whole after, ms"]
    print("\n".join(table(head, list(map(line, rows)))))


if __name__ == "__main__":
    main()
