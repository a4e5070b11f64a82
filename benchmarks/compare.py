"""Two checkouts of this project: does the newer one train to the same bits, and as fast?

    python -m benchmarks.compare OLD_CHECKOUT NEW_CHECKOUT DATA_DIR [--repeats 5]

Each measurement is a fresh process; the checkouts take turns, and the one that begins alternates. A ratio is the old
rate over the new one, repeat by repeat, so below 1 the new checkout is faster. Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from mnist_dist import runner
from mnist_dist.tables import cell, spread, table

SPEED = {  # title: options
    f"batch {batch}, {kind}": ["--batch-size", batch, "--compile", choice, *length]
    for batch, length in ((1, ["--epochs", 1, "--max-steps", 9000]), (200, ["--epochs", 4]))
    for kind, choice in (("compiled", "on"), ("plain", "off"))
}
BITS = {
    "float64, 1 process": ["--dtype", "float64", "--epochs", 2],
    "float64, 3 processes": ["--dtype", "float64", "--epochs", 2, "--processes", 3],
    "--reproducible, 2 processes": ["--reproducible", "--epochs", 1, "--processes", 2],
}


def trained(checkout: Path, data_dir: Path, options: list[Any], folder: Path) -> tuple[float, str]:
    """(samples per second over the run, SHA-256 of the model's file)."""
    command = [sys.executable, "-m", "mnist_dist", "train", "--dataset", "mnist", "--data-dir", data_dir, *options,
               "--wandb", "disabled", "--checkpoint-every", "never", "--output-dir", folder]
    done = runner.run(command, timeout=600, environment={"PYTHONPATH": str(checkout)}, cwd=checkout)
    if done.returncode:
        sys.exit(f"compare: error: {checkout}: {runner.last_error(done.stderr)}")
    rate = json.loads((folder / "result.json").read_bytes())["summary"]["samples_per_second"]
    return rate, hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    checkouts = {"old": args.old.resolve(), "new": args.new.resolve()}
    rates: dict[str, dict[str, list[float]]] = {title: {"old": [], "new": []} for title in SPEED}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/compiled"

        def run(which: str, title: str, options: list[Any], repeat: int) -> tuple[float, str]:
            print(f"{title}: {which}", file=sys.stderr, flush=True)
            folder = Path(scratch, f"{which}-{repeat}-{title.replace(' ', '')}")
            return trained(checkouts[which], args.data_dir.resolve(), options, folder)

        for repeat in range(args.repeats):
            for title, options in SPEED.items():
                for which in (["old", "new"] if repeat % 2 else ["new", "old"]):
                    rates[title][which].append(run(which, title, options, repeat)[0])
        bits = {title: {run(which, title, options, 0)[1] for which in checkouts} for title, options in BITS.items()}
    lines = [[title, *(cell(spread(measured[which])) for which in checkouts),
              cell(spread([old / new for old, new in zip(measured["old"], measured["new"], strict=True)])),
              f"{spread(measured['old']).median / spread(measured['new']).median:.3f}"]
             for title, measured in rates.items()]
    print("\n".join(table(["", "old (samples/s)", "new (samples/s)", "old / new", "ratio of medians"], lines)))
    print("\n".join(table(["trained weights", ""], [[title, "the same bits" if len(hashes) == 1 else "DIFFERENT"]
                                                    for title, hashes in bits.items()])))


if __name__ == "__main__":
    main()
