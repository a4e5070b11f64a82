"""How much slower a run becomes when another process keeps one core busy: ours, hand-written PyTorch, and JAX.

    python -m benchmarks.neighbour DATA_DIR OUTPUT.json [--rows A,B,…] [--batch-sizes 1,32,200] [--repeats 5]

On two cores a fair share of the machine is half of it if a run keeps both busy, so a ratio of 2 is what a run cannot
avoid. A measurement is a fresh process, as in `python -m benchmarks`; the rows take turns, in a random order, and each
is measured alone and beside the neighbour, one after the other. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.measure import measure, torchvision_root
from benchmarks.report import values
from benchmarks.rows import BY_NAME, num_samples
from mnist_dist.disk.files import replace_json
from mnist_dist.tables import cell, spread, table

ROWS = "mnist_dist,mnist_dist_plain,pytorch,jax_scan"
CONDITIONS = ("alone", "beside a neighbour")


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that does nothing but keep a core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def markdown(found: list[dict[str, Any]]) -> list[str]:
    """A line for each row and batch size: seconds per epoch alone and beside the neighbour, and their ratio."""
    lines = []
    for size, row in sorted({(one["batch_size"], one["row"]) for one in found}):
        alone, beside = (values({"measurements": [one for one in found if one["condition"] == condition]}, row, size)
                         for condition in CONDITIONS)
        ratios = [beside[repeat] / alone[repeat] for repeat in alone.keys() & beside.keys()]
        lines.append([BY_NAME[row].title, f"{size:,}", *(cell(spread(taken) if taken else None) for taken in (
            [*alone.values()], [*beside.values()], ratios))])
    return table(["", "batch", *CONDITIONS, "times"], lines)


def main() -> int:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbour", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--batch-sizes", default="1,32,200")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    cells = [(BY_NAME[row], int(size)) for row in given.rows.split(",") for size in given.batch_sizes.split(",")]
    found: list[dict[str, Any]] = []
    record = {"machine": describe(), "threads": os.environ.get("OMP_NUM_THREADS"), "measurements": found}
    with tempfile.TemporaryDirectory(prefix="mnist-dist-benchmark-") as name:
        scratch = Path(name)
        root = torchvision_root(given.data_dir, scratch / "data")
        for repeat in range(given.repeats):
            for row, size in random.Random(repeat).sample(cells, len(cells)):
                for condition in random.Random(repeat).sample(CONDITIONS, 2):
                    with nullcontext() if condition == CONDITIONS[0] else neighbour():
                        outcome = measure(row, root, size, num_samples(size, quick=False), "on", scratch)
                    found.append({"row": row.name, "batch_size": size, "repeat": repeat, "condition": condition,
                                  **outcome})
                    print(f"{repeat + 1}/{given.repeats} {row.name}, batch {size}, {condition}: "
                          f"{outcome.get('seconds', outcome.get('note'))}", file=sys.stderr, flush=True)
                    replace_json(given.output, record)
    print("\n".join(markdown(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
