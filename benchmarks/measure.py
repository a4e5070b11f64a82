"""Measurements, each in a fresh process, as plain dictionaries. A row that cannot run gets a note with the reason.

An outcome has `status` "ok" with the row's own line (samples, seconds, warmup_seconds, version, device), or "missing"
(a library that is not installed) or "failed", with a `note`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from mnist_dist import runner
from mnist_dist.processes.launch_environment import child_environment, num_cores

TIMEOUT_SECONDS = 1800  # of one measurement
MISSING = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


def torchvision_root(data_dir: str, scratch: Path) -> str:
    """A folder with `MNIST/raw` and the four files, unpacked, as torchvision wants them; downloads what is missing."""
    from mnist_dist.data import STEMS, obtain

    obtain("mnist", data_dir, os.environ.get("MNIST_DIST_MIRROR"), lambda message: None)
    raw = scratch / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in STEMS.values():
        for folder in (Path(data_dir, "MNIST", "raw"), Path(data_dir)):
            if (folder / stem).is_file():
                (raw / stem).symlink_to((folder / stem).resolve())
                break
            if (folder / f"{stem}.gz").is_file():
                with gzip.open(folder / f"{stem}.gz") as packed, (raw / stem).open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
                break
    return str(scratch)


def measure(row: Row, data_dir: str, batch_size: int, num_samples: int, compile: str, scratch: Path) -> dict[str, Any]:
    """Run the row once, in a fresh process, and return its outcome. `scratch` is kept between calls."""
    environment = child_environment()
    # a compiler's cache per cell: the first measurement of a cell compiles for real, the later ones find it
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "compiled" / f"{row.name}-{batch_size}")
    environment["HF_HOME"] = str(scratch / "no-accelerate-config")
    if row.processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // row.processes)))
    begin = time.perf_counter()
    try:
        if row.module is None:
            line = ours(row, data_dir, batch_size, num_samples, compile, scratch / "run", environment)
        else:
            line = last_json(finished(row.command(data_dir, batch_size, num_samples), environment))
        outcome = {"status": "ok", **line}
    except RowError as error:
        missing = MISSING.search(str(error))
        outcome = {"status": "missing" if missing else "failed",
                   "note": f"not installed: {missing[1]}" if missing else str(error)}
    return outcome | {"wall_seconds": time.perf_counter() - begin}


def ours(row: Row, data_dir: str, batch_size: int, num_samples: int, compile: str, folder: Path,
         environment: Mapping[str, str]) -> dict[str, Any]:
    """`mnist-dist train`, in the peers' words: its last epoch, of which the warm-up is excluded already."""
    shutil.rmtree(folder, ignore_errors=True)
    length = ["--epochs", 1, "--max-steps", num_samples] if batch_size == 1 else ["--epochs", 2]
    outcome = runner.train(["--dataset", "mnist", "--data-dir", data_dir, "--batch-size", batch_size, *length,
                            "--compile", compile, "--wandb", "disabled", "--checkpoint-every", "never",
                            *row.arguments], folder,
                           processes=row.processes, timeout=TIMEOUT_SECONDS, environment=environment)
    result = outcome.result
    if result is None or outcome.note:
        raise RowError(outcome.note)
    first, last = result.epochs[0], result.epochs[-1]
    if not last.measured_samples:
        raise RowError("the epoch is too short to leave anything measured after the warm-up")
    return {
        "samples": last.measured_samples, "seconds": last.measured_seconds,
        "warmup_seconds": result.summary.compile_seconds + first.warmup_seconds,
        "version": f"mnist_dist {result.environment.mnist_dist}", "device": result.environment.device,
        "data_wait_fraction": last.data_wait_fraction,
    }


class RowError(Exception):
    """A row could not be measured: one line says why."""


def finished(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What the command printed. Raises `RowError` with its last error if it fails or takes too long."""
    try:
        done = runner.run(command, timeout=TIMEOUT_SECONDS, environment=environment)
    except subprocess.TimeoutExpired:
        raise RowError(f"no result after {TIMEOUT_SECONDS} s: ended") from None
    if done.returncode:
        raise RowError(runner.last_error(done.stderr) or f"exit status {done.returncode}")
    return done.stdout


def last_json(output: str) -> dict[str, Any]:
    """The JSON object of the last line. Raises `RowError` if there is none."""
    try:
        return dict(json.loads(output.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        raise RowError("printed no line of JSON") from None


def run_all(order: Sequence[tuple[int, Row, int]], measure_row: Callable[[Row, int], dict[str, Any]],
            keep: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> None:
    """Measure in this order; each outcome goes to `keep` at once. What is not installed, or failed, is not retried."""
    given_up: set[tuple[str, int | None]] = set()
    took: dict[tuple[str, int], float] = {}
    for index, (repeat, row, batch_size) in enumerate(order):
        cells = [(later.name, size) for _, later, size in order[index:]
                 if not {(later.name, None), (later.name, size)} & given_up]
        if cells[:1] != [(row.name, batch_size)]:
            continue
        left = _seconds_left(cells, took)
        say(f"{index + 1}/{len(order)} repeat {repeat + 1}, batch {batch_size}: {row.name}{left}")
        outcome = measure_row(row, batch_size)
        keep({"row": row.name, "processes": row.processes, "batch_size": batch_size, "repeat": repeat, **outcome})
        took[row.name, batch_size] = outcome["wall_seconds"]
        if outcome["status"] != "ok":
            say(f"  {outcome['note']}")
            given_up.add((row.name, None if outcome["status"] == "missing" else batch_size))


def _seconds_left(cells: Sequence[tuple[str, int]], took: Mapping[tuple[str, int], float]) -> str:
    """Time to go, as a cell took last, or as cells did in the mean."""
    if not took:
        return ""
    mean = sum(took.values()) / len(took)
    minutes, seconds = divmod(round(sum(took.get(cell, mean) for cell in cells)), 60)
    return f" (about {minutes} min {seconds:02d} s to go)"
