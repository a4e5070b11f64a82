"""How soon a run answers: its first line, its first row, its end, of two checkouts in turns.

    python -m benchmarks.first_line OLD NEW DATA_DIR [TURNS]

OLD and NEW are checkouts of this repository, and change places from turn to turn. Each measurement is `mnist-dist
train`, with its defaults, in a fresh process. A ratio is NEW over OLD, turn by turn.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mnist_dist.tables import cell, spread, table

MOMENTS = ("first line", "first row", "end")


def moments(checkout: str, data_dir: str) -> list[float]:
    """Seconds from the start of the process to each of `MOMENTS`."""
    with tempfile.TemporaryDirectory() as place:
        begin, seconds = time.perf_counter(), []
        words = [sys.executable, "-m", "mnist_dist", "train", "--data-dir", data_dir, "--wandb", "disabled",
                 "--output-dir", f"{place}/run"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=place,
                              env={**os.environ, "PYTHONPATH": checkout}) as run:
            assert run.stdout is not None
            for line in run.stdout:
                if not seconds or (len(seconds) == 1 and line.split()[:1] == ["0"]):
                    seconds.append(time.perf_counter() - begin)
        seconds.append(time.perf_counter() - begin)
    if run.returncode or len(seconds) < len(MOMENTS):
        raise SystemExit(f"the run of {checkout} ended with status {run.returncode}")
    return seconds


def main(old: str, new: str, data_dir: str, turns: str = "3") -> None:
    """Measure, and print the table."""
    checkouts = [str(Path(checkout).resolve()) for checkout in (old, new)]
    measured = []
    for turn in range(int(turns)):
        order = checkouts if turn % 2 else checkouts[::-1]
        by_checkout = {checkout: moments(checkout, str(Path(data_dir).resolve())) for checkout in order}
        measured.append([by_checkout[checkout] for checkout in checkouts])
    lines = []
    for at, name in enumerate(MOMENTS):
        before, after = ([turn[which][at] for turn in measured] for which in (0, 1))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        lines.append([name, *(cell(spread(values)) for values in (before, after, ratios))])
    print("\n".join(table(["", "old, s", "new, s", "new / old"], lines)))


if __name__ == "__main__":
    main(*sys.argv[1:])
