"""What checkpoints cost a run: batch 200 with one every 100 steps, and without, in turns.

    python -m benchmarks.checkpoint_cost DATA_DIR OUTPUT.json [--turns 9] [--epochs 8]

The time of a run is from the line of its first epoch to that of its last: steps, evaluations and checkpoints. Writes
every time to OUTPUT.json, and prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from mnist_dist.processes.launch import child_environment
from mnist_dist.record.files import replace_json
from mnist_dist.record.result import read_result
from mnist_dist.tables import cell, spread, table

EVERY = ("never", "100steps")
CASES = [(processes, compile) for processes in (1, 2) for compile in ("on", "off")]
TIMEOUT_SECONDS = 600.0


def timed(data_dir: str, folder: Path, epochs: int, processes: int, compile: str, every: str) -> dict[str, Any]:
    """One run: seconds between the lines of its first and its last epoch, and what its checkpoints took."""
    words = [sys.executable, "-m", "mnist_dist", "train", "--data-dir", data_dir, "--dataset", "mnist", "--epochs",
             str(epochs), "--processes", str(processes), "--compile", compile, "--wandb", "disabled",
             "--checkpoint-every", every, "--output-dir", str(folder)]
    times = {}
    with subprocess.Popen(words, env=child_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if (first := line.split()[:1]) and first[0].isdigit():
                times[int(first[0])] = time.perf_counter()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: exit status {process.returncode}")
    summary = read_result(folder).summary
    return {"processes": processes, "compile": compile, "every": every, "seconds": times[epochs - 1] - times[0],
            "checkpoints": summary.checkpoints, "pause_seconds": summary.checkpoint_pause_seconds,
            "whole_seconds": summary.checkpoint_seconds}


def line(rows: list[dict[str, Any]], processes: int, compile: str) -> list[str]:
    """One case: the extra time, turn by turn, and the times of a checkpoint."""
    own = [row for row in rows if (row["processes"], row["compile"]) == (processes, compile)]
    without, with_them = ([row for row in own if row["every"] == every] for every in EVERY)
    extra = [100 * (b["seconds"] / a["seconds"] - 1) for a, b in zip(without, with_them, strict=True)]
    low, high = statistics.quantiles(extra, n=4)[::2] if len(extra) > 1 else (extra[0], extra[0])
    return [f"{processes}", "compiled" if compile == "on" else "plain",
            cell(spread([row["seconds"] for row in without])), cell(spread([row["seconds"] for row in with_them])),
            f"{statistics.median(extra):.1f} ({low:.1f} to {high:.1f})",
            *(cell(spread([1000 * row[name] for row in with_them])) for name in ("pause_seconds", "whole_seconds"))]


def main() -> None:
    """Run everything, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_cost", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for turn in range(given.turns):
        for processes, compile in CASES:
            for every in EVERY if turn % 2 else reversed(EVERY):
                with tempfile.TemporaryDirectory(dir=given.output.parent) as scratch:
                    rows.append(timed(given.data_dir, Path(scratch) / "run", given.epochs, processes, compile, every))
                print(rows[-1], file=sys.stderr, flush=True)
    replace_json(given.output, {"machine": describe(), "turns": given.turns, "epochs": given.epochs, "rows": rows})
    head = ["processes", "step", "without, s", "with, s", "more, % (middle half)", "pause, ms", "whole after, ms"]
    print("\n".join(table(head, [line(rows, *case) for case in CASES])))


if __name__ == "__main__":
    main()
