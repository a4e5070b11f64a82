"""Does anything change the bits of a `--reproducible` run, and what does it cost?

    python -m benchmarks.bits DATA_DIR OUTPUT.json [--steps 300] [--ways "1 process,1 GPU"]

Each way trains so many steps at batch 200 in a folder of its own, on the CPU or on GPUs, and its weights are compared
with those of the first way, by SHA-256. Then the exact step is timed beside the plain one, in turns, in one process.
Writes OUTPUT.json, prints Markdown; the exit status is 1 if any way has other bits.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from benchmarks.machine import describe
from mnist_dist import runner
from mnist_dist.config import TrainConfig
from mnist_dist.data import load
from mnist_dist.disk.files import replace_json
from mnist_dist.processes.launch_environment import Launch, child_environment
from mnist_dist.processes.team import join
from mnist_dist.tables import cell, spread, table
from mnist_dist.training.trainer import Trainer

TIMEOUT_SECONDS = 600.0
BATCH_SIZES, TURNS, STEPS = (1, 20, 200, 2000), 15, 20


class Way(NamedTuple):
    """A way to train the same: in parts, each on so many processes until so many steps are done; the environment."""

    name: str
    parts: Sequence[tuple[int, float]] = ((1, 1.0),)  # processes, and the part of the steps that is done then
    environment: tuple[tuple[str, str], ...] = ()


WAYS = (
    *(Way(f"{size} process{'es' if size > 1 else ''}", ((size, 1.0),)) for size in (1, 2, 3, 4, 8)),
    Way("1, then 4, then 3 processes", ((1, 0.31), (4, 0.67), (3, 1.0))),
    *(Way(f"{variable}={value}", environment=((variable, value),))
      for variable, values in {"OMP_NUM_THREADS": ("2",), "ATEN_CPU_CAPABILITY": ("default", "avx2", "avx512"),
                               "MKL_CBWR": ("COMPATIBLE", "AVX2", "AVX512")}.items() for value in values),
    *(Way(f"{size} GPU{'s' if size > 1 else ''}", ((size, 1.0),), (("ACCELERATE_USE_CPU", "false"),))
      for size in (1, 2, 3, 4, 8) if size <= torch.cuda.device_count()),
)


def weights_of(way: Way, data_dir: str, steps: int, folder: Path) -> dict[str, Any]:
    """The weights after these steps, and their SHA-256."""
    for size, part in way.parts:
        words = ["--dataset", "mnist", "--data-dir", data_dir, "--reproducible", "--resume", "--checkpoint-every",
                 "1000steps", "--wandb", "disabled", "--max-steps", str(round(part * steps)), "--epochs", "1000"]
        outcome = runner.train(words, folder, processes=size, timeout=TIMEOUT_SECONDS,
                               environment={**child_environment(), "OMP_NUM_THREADS": "1",
                                            "ACCELERATE_USE_CPU": "true", **dict(way.environment)})
        if outcome.note:
            raise SystemExit(f"{way.name}: {outcome.note}")
    tensors = load_file(folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {"way": way.name, "sha256": digest, "weights": tensors}


def step_ms(data_dir: str, batch_size: int) -> dict[str, list[float]]:
    """Milliseconds of a step of each kind, in turns, on the first GPU, else on the CPU: medians of 20 steps each."""
    torch.set_num_threads(1)
    sets, team = load("mnist", data_dir), join(Launch(), timeout_s=60, mixed_precision="no", dynamo_backend="no")
    trainers = {}
    for kind in ("plain", "exact"):
        config = TrainConfig(batch_size=batch_size, compile="off", reproducible=kind == "exact")
        trainers[kind] = Trainer(config, team, sets)
        trainers[kind].make_step()
    times_of: dict[str, list[float]] = {kind: [] for kind in trainers}
    for turn in range(TURNS):
        for kind, trainer in trainers.items():
            trainer.step.begin(turn, range(STEPS))
            seconds = []
            for step in range(STEPS):
                begin = time.perf_counter()
                trainer.step.take(range(step, step + 1))
                team.wait_for_device()
                seconds.append(time.perf_counter() - begin)
            times_of[kind].append(1000 * statistics.median(seconds))
    return times_of


def main() -> None:
    """Train every way, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ways", help="only these, by name, with commas (default: all)")
    args = parser.parse_args()
    names = {way.name: way for way in WAYS}
    if unknown := [name for name in (args.ways or "").split(",") if name and name not in names]:
        parser.error(f"--ways: unknown on this machine: {', '.join(unknown)}; there are {', '.join(names)}")
    ways = [names[name] for name in args.ways.split(",")] if args.ways else WAYS
    rows, wrong = [], []
    for way in ways:
        with tempfile.TemporaryDirectory(dir=args.output.parent) as scratch:
            row = weights_of(way, args.data_dir, args.steps, Path(scratch) / "run")
        weights = row.pop("weights")
        if not rows:
            reference = weights
        row["largest_difference"] = max(float((weights[name] - reference[name]).abs().max()) for name in reference)
        rows.append(row)
        if row["sha256"] != rows[0]["sha256"]:
            wrong.append(way.name)
        print(row, file=sys.stderr, flush=True)
    times = {batch_size: step_ms(args.data_dir, batch_size) for batch_size in BATCH_SIZES}
    replace_json(args.output, {"machine": describe(), "steps": args.steps, "rows": rows, "step_ms": times})
    print("\n".join(table(["what", "SHA-256 of the weights", "largest difference of a weight"],
                          [[row["way"], f"`{row['sha256'][:16]}`", f"{row['largest_difference']:.1e}"]
                           for row in rows])))
    print()
    lines = []
    for batch_size, of_kind in times.items():
        ratios = [exact / plain for exact, plain in zip(of_kind["exact"], of_kind["plain"], strict=True)]
        lines.append([str(batch_size), *(cell(spread(of_kind[kind])) for kind in ("plain", "exact")),
                      cell(spread(ratios))])
    print("\n".join(table(["batch", "plain step, ms", "exact step, ms", "ratio"], lines)))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
