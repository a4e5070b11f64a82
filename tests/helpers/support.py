"""What several test files share: small IDX folders, and the command line run in processes of its own."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import run_forked

from mnist_dist import cli, runner
from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.record import EpochRecord, RunResult, RunSummary
from mnist_dist.record.environment import Environment
from mnist_dist.record.rank_summary import over_ranks

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within the context, PyTorch takes so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def idx_bytes(array: np.ndarray) -> bytes:
    """`array` uint8 as an IDX file."""
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_idx_folder(folder: Path, num_train: int, num_test: int, *, zipped: bool = False) -> Path:
    """A data set that can be learnt: ten fixed patterns under noise, in four IDX files."""
    generator = np.random.default_rng(12345)
    patterns = generator.integers(0, 256, (10, 28, 28))
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", num_train), ("t10k", num_test)):
        labels = generator.integers(0, 10, count).astype(np.uint8)
        noise = generator.integers(0, 256, (count, 28, 28))
        images = ((patterns[labels] + 3 * noise) // 4).astype(np.uint8)
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            content = idx_bytes(array)
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


def run(command: Sequence[object], *, cwd: Path, timeout: float = 300, **environment: str
        ) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as a person would, with what it printed. It never reaches W&B or reads a keyboard."""
    return runner.run(command, cwd=cwd, timeout=timeout, environment=environment)


def mnist_dist(*words: object, cwd: Path, timeout: float = 300, **environment: str
               ) -> subprocess.CompletedProcess[str]:
    """Run `mnist-dist WORDS`, with `--processes N` on so many ranks. The processes are forked: see forked.py."""
    size, rest = 1, list(words)
    if "--processes" in rest and str(rest[rest.index("--processes") + 1]).isdecimal():
        at = rest.index("--processes")
        size = int(rest.pop(at + 1))
        rest.pop(at)
    return run_forked(rest, cwd=cwd, size=size, timeout=timeout, environment=environment)


def mnist_dist_launched(*words: object, cwd: Path, timeout: float = 300, **environment: str
                        ) -> subprocess.CompletedProcess[str]:
    """Run `python -m mnist_dist WORDS` as a person does, with nothing imported before."""
    return run([sys.executable, "-m", "mnist_dist", *words], cwd=cwd, timeout=timeout,
               **{**child_environment(), **environment})


def epochs_of(folder: Path) -> int:
    """How many epochs the run there has recorded so far."""
    return len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0


def wait_for_epochs(folder: Path, number: int, deadline: float = 100.0) -> None:
    """Wait until the run there has recorded so many epochs."""
    until = time.monotonic() + deadline
    while epochs_of(folder) < number:
        assert time.monotonic() < until, "the run did not get under way"
        time.sleep(0.05)


def run_here(words: Sequence[str]) -> int:
    """`mnist-dist WORDS` in this process; the exit status. `main` would end the process if a thread of W&B is left."""
    return cli._status(words)[0]


def epoch_record(**metrics: Any) -> EpochRecord:
    """A record with these figures, and something plausible for the others."""
    others = {"epoch": 0, "step": 300, "train_loss": 0.5, "test_nll": 0.25, "test_nll_sum": 2500.0,
              "test_accuracy": 0.9, "test_count": 10_000, "train_seconds": 1.0, "warmup_seconds": 0.0,
              "measured_seconds": 1.0, "measured_samples": 60_000, "samples_per_second": 6e4,
              "samples_per_second_per_process": 6e4, "step_ms_p50": 3.0, "step_ms_p95": 4.0,
              "data_wait_fraction": 0.1, "eval_seconds": 0.1, "epoch_seconds": 1.1, "peak_memory_bytes": 10**9,
              "ranks": over_ranks([{"step_ms": 3.0, "own_ms": 3.0, "data_wait_ms": 0.3, "peak_memory_bytes": 10**9,
                                    "host": "attic"}]), "evaluations": []}
    return EpochRecord(**{**others, **metrics})


def run_summary(**metrics: Any) -> RunSummary:
    """A summary with these figures, and something plausible for the others."""
    others = {"global_batch_size": 200, "per_device_batch_size": 200, "learning_rate": 1e-4, "compile_seconds": 0.0,
              "samples_per_second": 6e4, "best_test_nll": 0.25, "final_test_nll": 0.25, "seconds_to_target": None,
              "steps_to_target": None, "targets": []}
    return RunSummary(**{**others, **metrics})


def run_result(epochs: Sequence[EpochRecord], dataset: str = "mnist", **summary: Any) -> RunResult:
    """The result of a run on one CPU process."""
    environment = Environment(
        device="cpu", device_name="abacus", num_processes=1, num_machines=1, num_threads=1, mixed_precision="no",
        step="plain", torch="2", accelerate="1", python="3", mnist_dist="0", git_commit=None,
    )
    return RunResult(status="completed", config={"seed": 3}, environment=environment, epochs=tuple(epochs),
                     dataset={"name": dataset, "train": 60_000, "test": 10_000}, summary=run_summary(**summary))


def result_of(folder: Path) -> dict[str, Any]:
    """A run's `result.json`."""
    return json.loads((folder / "result.json").read_text())


def windows_of(folder: Path) -> list[list[list[float]]]:
    """Of each epoch that a run has recorded, its windows: [steps, samples, seconds]."""
    return [json.loads(line)["windows"] for line in (folder / "windows.jsonl").read_text().splitlines()]


def check_one_run(folder: Path, size: int) -> dict[str, Any]:
    """The result of the one run below `folder`/runs: on `size` CPU processes, with one run in W&B, offline."""
    (only,) = (folder / "runs").iterdir()
    result = result_of(only)
    assert result["environment"]["num_processes"] == size
    assert result["environment"]["device"] == "cpu"
    assert result["epochs"][-1]["test_count"] == 211
    assert len(list((only / "wandb").glob("offline-run-*"))) == 1
    assert len((only / "metrics.jsonl").read_text().splitlines()) == 1
    return result


def records_of(folder: Path, name: str = "offline-run-*") -> dict[str, list]:
    """What W&B's own reader finds in the one offline run of a folder that has this name, by type."""
    (offline,) = (folder / "wandb").glob(name)
    done = run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", offline], cwd=folder)
    if done.returncode == 2 and "Usage:" in done.stderr:
        pytest.skip("this version of wandb cannot read its own files back: 0.31 can")
    assert done.returncode == 0, done.stderr
    records: dict[str, list] = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record[record["type"]])
    return records


def assert_one_line_error(done: subprocess.CompletedProcess[str], *needles: str, status: int = 2) -> None:
    """The command ended with `status` and one line on standard error that holds all the needles."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1 and lines[0].startswith("mnist-dist: error: "), done.stderr
    for needle in needles:
        assert needle in lines[0], f"{needle!r} is not in: {lines[0]}"


def take_steps(trainer: Any, epoch: int, steps: range, watch: Any, schedule: Any) -> None:
    """Have a `Trainer` take these steps of the epoch, as the loop of a run does."""
    trainer.begin(epoch, steps, watch)
    while trainer.left:
        trainer.advance(schedule)
