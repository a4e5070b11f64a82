"""How long `mnist-dist report` takes for a large study.

    python -m benchmarks.study_report [ROWS] [REPEATS]

The table has 20 repeats of each cell, drawn from the real runs of docs/studies/repeats: batch sizes 10, 20, … on 1, 2,
4 and 8 processes. Each time is the wall time of a fresh process in seconds, which fails if it imports torch.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mnist_dist.tables import cell, spread

RUNS = Path(__file__).parents[1] / "docs" / "studies" / "repeats" / "runs.jsonl"
REPEATS_OF_A_CELL = 20
PROCESSES = (1, 2, 4, 8)
CHECKED = ("import sys; from mnist_dist.cli import main; status = main(['report', sys.argv[1]]); "
           "sys.exit('torch was imported' if 'torch' in sys.modules else status)")


def write_table(folder: Path, count: int) -> None:
    """A table of so many rows."""
    drawn = random.Random(0)
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()]
    runs = [run for run in runs if run["status"] == "completed" and run["role"] == "repeat"]
    with (folder / "runs.jsonl").open("w") as file:
        for place in range(count):
            repeat, number = divmod(place, max(1, count // REPEATS_OF_A_CELL))
            batch, processes = 10 * (number // len(PROCESSES) + 1), PROCESSES[number % len(PROCESSES)]
            row = {**drawn.choice(runs), "run": f"b{batch}-p{processes}-repeat-{repeat}", "order": place + 1,
                   "repeat": repeat, "global_batch_size": batch, "processes": processes}
            file.write(json.dumps(row) + "\n")


def main(count: int = 10_000, repeats: int = 5) -> None:
    """Write the table, report on it in fresh processes, print."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder), count)
        for _ in range(repeats):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", CHECKED, folder], check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - begin)
    print(f"A report on {count:,} rows takes {cell(spread(taken))} s (median of {repeats}), and imports no torch.")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
