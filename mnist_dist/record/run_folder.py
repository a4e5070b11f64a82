"""The folder of a run: the names of its files, how it is opened, and the files that grow or change during the run."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from mnist_dist.config import TrainConfig
from mnist_dist.disk.files import (
    append_line,
    cut_lines,
    make_folder,
    names_in,
    read_json_lines,
    real,
    remove,
    remove_left,
    replace_synced,
)
from mnist_dist.disk.lock import FolderLock, Held
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.record.config_file import config_text
from mnist_dist.record.metrics import EpochRecord

MOST = 10**15  # of a number in a file that is read back
STEPS, WINDOWS = "steps.jsonl", "windows.jsonl"
METRICS, RESULT, CONFIG, MODEL = "metrics.jsonl", "result.json", "config.yaml", "model.safetensors"
CHECKPOINTS, PREDICTIONS, CURVES, WANDB = "checkpoints", "predictions.png", "curves.png", "wandb"
OF_A_RUN = (METRICS, STEPS, WINDOWS, RESULT, CONFIG, MODEL, CHECKPOINTS, PREDICTIONS, CURVES, WANDB)


def open_folder(config: TrainConfig, wait_s: float = 0.0) -> tuple[Path, str, FolderLock]:
    """Create the run's folder, and lock it; returns it, a new run id, and the lock. Waits `wait_s` seconds for another
    run in it to end. Raises `UserError`.
    """
    run_id = secrets.token_hex(4)
    folder = real(Path(config.output_dir or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{run_id}"))
    for name in (CHECKPOINTS, WANDB):
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name} is a symbolic link: what is written to it would be outside of the run's "
                            "folder; move the folder that it names there, or give another --output-dir")
    try:
        make_folder(folder)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        lock = FolderLock(folder)
        lock.acquire(wait_s)
        if not config.resume and _holds_a_run(folder):
            lock.release()
            raise UserError(f"--output-dir {folder} already holds a run: give another, or continue that one with "
                            "--resume")
        for name in (METRICS, RESULT, CONFIG, MODEL, PREDICTIONS, CURVES):
            remove_left(folder / name)
    except Held as error:
        raise UserError(f"--output-dir {folder} is in use by {error}: wait until that run has ended, or give another "
                        "folder") from None
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written ({error.strerror}): give another") from None
    return folder, run_id, lock


def close_folder(folder: Path, lock: FolderLock, is_new: bool) -> None:
    """Give the lock back. A new folder that has nothing in it, of a run that was refused, is removed."""
    lock.release()
    if is_new:
        with suppress(OSError):
            folder.rmdir()


def _holds_a_run(folder: Path) -> bool:
    """Whether a run has left a result, an epoch or a checkpoint in this folder."""
    checkpoints, metrics = folder / CHECKPOINTS, folder / METRICS
    return (folder / RESULT).exists() or (metrics.exists() and metrics.stat().st_size > 0) or (
        checkpoints.exists() and any(name.startswith("step-") for name in names_in(checkpoints)))


def check_place(config: TrainConfig) -> None:
    """Raises `UserError` if --output-dir is a file or folder that belongs to a run, as RUN/checkpoints does."""
    path = Path(os.path.abspath(config.output_dir or "."))
    for run in path.parents if config.output_dir else ():
        if path.relative_to(run).parts[0] in OF_A_RUN and (run / CONFIG).is_file() and (run / METRICS).is_file():
            raise UserError(f"--output-dir {config.output_dir} is inside of the run {run}: give --output-dir {run}"
                            f"{'' if config.resume else ' --resume to continue it'}, or a folder outside of it")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """For code that writes to the run's folder. Raises `MnistDistError` if the disk is full or fails."""
    try:
        yield
    except OSError as error:
        name = error.filename or folder
        raise MnistDistError(f"{name} could not be written ({error.strerror or error}): free some space and continue "
                             f"with --resume --output-dir {folder}") from None


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the run's `config.yaml`. Raises `MnistDistError`."""
    with writing(folder):
        replace_synced(folder / CONFIG, config_text(config).encode())


def remove_result(folder: Path) -> None:
    """Remove the `result.json` of an earlier start: from now on the run is not completed. Raises `MnistDistError`."""
    with writing(folder):
        remove(folder / RESULT)


def write_metrics(folder: Path, records: Sequence[EpochRecord]) -> None:
    """Make `metrics.jsonl` hold exactly these records: those of the checkpoint that is continued, or none. Raises
    `MnistDistError`.
    """
    with writing(folder):
        replace_synced(folder / METRICS, "".join(record.line for record in records).encode())


def append_metrics(folder: Path, record: EpochRecord) -> None:
    """Append one epoch's line to `metrics.jsonl`. Raises `MnistDistError`."""
    with writing(folder):
        append_line(folder / METRICS, record.line)


def append_all(path: Path, values: Sequence[Mapping[str, Any]]) -> None:
    """Append a line of JSON for each of these to a file of the run, in one write. Raises `MnistDistError`."""
    with writing(path.parent):
        append_line(path, "".join(json.dumps(value, allow_nan=False) + "\n" for value in values))


def read_points(folder: Path) -> list[dict[str, Any]]:
    """The lines of `steps.jsonl`, for W&B and a picture; none if it is not there, is damaged, or too large for them."""
    try:
        points = read_json_lines(folder / STEPS)
        for point in points:
            if not all(0 <= point[name] < MOST for name in ("step", "epoch", "train_loss")):
                raise ValueError
            point.setdefault("samples_per_second")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return points


def cut_back(path: Path, keeps: Callable[[Mapping[str, Any]], bool]) -> None:
    """Cut a file of lines of JSON before the first line that `keeps` refuses or that is damaged: to what was there at
    the checkpoint that is continued. Raises `MnistDistError`.
    """
    def is_kept(line: bytes) -> bool:
        try:
            return keeps(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    with writing(path.parent):
        cut_lines(path, is_kept)
