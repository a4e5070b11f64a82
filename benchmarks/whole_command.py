"""A whole command, from the keyboard to the result, beside a script that a person writes for this task.

    python -m benchmarks.whole_command DATA_DIR OUTPUT.json [--repeats 5] [--epochs 20] [--batch-size 200]

Each is a fresh process; they take turns, in a random order. Seconds until the first line is there, and until the end.
The script in JAX takes part if JAX is installed. "Cold" is without compiled code, as the first time on a machine;
files of libraries are in the memory of the operating system, in all rows. DATA_DIR holds MNIST/raw, as torchvision has
it. Prints Markdown.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from mnist_dist.disk.files import replace_json
from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.tables import cell, spread, table

HAND_WRITTEN, JAX = "hand-written script", "the same in JAX"
SCRIPTS = {HAND_WRITTEN: "script.py", JAX: "jax_script.py"}  # in peers/
WARM = "`train.py --compile on`, warm"
OPTIONS = {"`train.py --compile on`, cold": ["--compile", "on"], WARM: ["--compile", "on"], "`train.py`": []}


def timed(command: Sequence[object], folder: Path, cache: Path) -> dict[str, float]:
    """Seconds until the first line and until the end. Raises `CalledProcessError`."""
    begin = time.perf_counter()
    environment = {**child_environment(), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, text=True, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return {"first_line_seconds": first, "seconds": time.perf_counter() - begin}


def command_of(row: str, args: argparse.Namespace, output_dir: Path) -> list[object]:
    """The words of a row, after `python`."""
    if row in SCRIPTS:
        script = Path(__file__).parent / "peers" / SCRIPTS[row]
        return [script, args.data_dir.resolve(), args.epochs, args.batch_size]
    root = Path(__file__).resolve().parents[1]
    return [root / "train.py", *OPTIONS[row], "--data-dir", args.data_dir.resolve(), "--epochs", args.epochs,
            "--batch-size", args.batch_size, "--wandb", "disabled", "--output-dir", output_dir]


def markdown(turns_of: dict[str, list[dict[str, float]]]) -> list[str]:
    """A line for each row: medians with their spread, and how many times the hand-written script's time."""
    base = [turn["seconds"] for turn in turns_of[HAND_WRITTEN]]
    lines = []
    for row, turns in turns_of.items():
        ratios = [turn["seconds"] / other for turn, other in zip(turns, base, strict=True)]
        lines.append([row, *(cell(spread(values)) for values in (
            [turn["first_line_seconds"] for turn in turns], [turn["seconds"] for turn in turns], ratios))])
    return table(["", "first line, s", "all, s", "times the hand-written script"], lines)


def main() -> int:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_command", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("output", type=Path)
    for name, default in (("repeats", 5), ("epochs", 20), ("batch-size", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rows = [HAND_WRITTEN, *([JAX] if find_spec("jax") else []), *OPTIONS]
    turns_of: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed(command_of(WARM, args, folder / "run"), folder, folder / "warm")
        for turn in range(args.repeats):
            for row in random.Random(turn).sample(rows, len(rows)):
                cache = folder / ("cold" if "cold" in row else "warm")
                shutil.rmtree(folder / "cold", ignore_errors=True)
                shutil.rmtree(folder / "run", ignore_errors=True)
                turns_of[row].append(timed(command_of(row, args, folder / "run"), folder, cache))
                print(turn, row, turns_of[row][-1], file=sys.stderr, flush=True)
    values: dict[str, Any] = {"machine": describe(), "epochs": args.epochs, "batch_size": args.batch_size,
                              "rows": turns_of}
    replace_json(args.output, values)
    print("\n".join(markdown(turns_of)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
