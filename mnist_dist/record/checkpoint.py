"""Checkpoints that are whole or absent: tensors as safetensors, the rest as JSON, a manifest of checksums last.

A checkpoint is written to a temporary folder, synced, and renamed. If it does not match its manifest, a warning names
it, and the previous checkpoint is read. Nothing is unpickled. One process writes, beside its training; it knows nothing
of the other ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mnist_dist.disk.files import (
    JSON_LIMIT,
    MEGABYTE,
    make_folder,
    names_in,
    read_json,
    read_limited,
    remove_tree,
    rename,
    sync_folder,
    write_synced,
)
from mnist_dist.errors import MnistDistError
from mnist_dist.text import cause

FORMAT = 4  # of what a run keeps in STATE; a run of another format is not continued
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class Checkpoint(NamedTuple):
    """A checkpoint that was read: its folder, the tensors, and the rest of the state."""

    folder: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as one safetensors file."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


class CheckpointWriter:
    """Writes the checkpoints of one run below `root` beside its training, one at a time, and keeps the newest `keep`.

    Leaving it as a context waits for the checkpoint in progress. `check` is called before each checkpoint is written,
    and may raise.
    """

    def __init__(self, root: Path, keep: int, check: Callable[[], None] = lambda: None) -> None:
        self.root, self.keep, self.check = root, keep, check
        self.pauses: list[float] = []  # seconds that each kept the caller
        self.delays: list[float] = []  # seconds from the request until each was whole
        self._content = bytearray()  # of the file of tensors
        self._places: dict[str, Tensor] = {}  # the tensors in it
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy everything, and begin to write `root`/step-<step>. Waits for the previous checkpoint, and raises as
        `wait`. If a tensor is not finite, nothing is written: the last good checkpoint stays the newest.
        """
        begin = time.perf_counter()
        self.wait()
        self._copy(tensors)
        # the least and the largest: one pass, and a twelfth of the time of isfinite
        ends = (end for tensor in self._places.values() for end in tensor.aminmax())
        if not all(math.isfinite(end) for end in ends):
            return
        files = {TENSORS: self._content, STATE: json.dumps(state, allow_nan=False).encode()}
        self._thread = threading.Thread(target=self._write, args=(step, files, begin), name="checkpoint")
        self._thread.start()
        self.pauses.append(time.perf_counter() - begin)

    def tidy(self, step: int) -> None:
        """Finish what an earlier process left undone, whose last checkpoint was that of this step."""
        _remove_left(self.root)
        _drop_old(self.root, step, self.keep)

    def wait(self) -> None:
        """Wait until the last checkpoint is whole. Raises `MnistDistError` if the disk is full or fails; the older
        checkpoints are then unchanged.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def metrics(self) -> dict[str, Any]:
        """The number of checkpoints and their times, as `RunSummary` names them."""
        return {
            "checkpoints": len(self.delays),
            "checkpoint_pause_seconds": statistics.median(self.pauses) if self.pauses else None,
            "checkpoint_seconds": statistics.median(self.delays) if self.delays else None,
        }

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.nullcontext() if kind is None else contextlib.suppress(MnistDistError):
            self.wait()

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors to their places in the file's bytes, which then only have to be written."""
        if not self._content:
            self._content = bytearray(tensor_bytes(tensors))
            # a safetensors file has the length of its head, the head as JSON, the data
            start = 8 + int.from_bytes(self._content[:8], "little")
            for name, place in json.loads(self._content[8:start]).items():
                self._places[name] = torch.frombuffer(
                    self._content, dtype=tensors[name].dtype, count=tensors[name].numel(),
                    offset=start + place["data_offsets"][0],
                ).view(tensors[name].shape)
        for name, tensor in tensors.items():
            self._places[name].copy_(tensor.detach())

    def _write(self, step: int, files: dict[str, bytes | bytearray], begin: float) -> None:
        try:
            self.check()
            _write_checkpoint(self.root, step, files, self.keep)
            self.delays.append(time.perf_counter() - begin)
        except BaseException as error:
            self._error = error


def _write_checkpoint(root: Path, step: int, files: dict[str, bytes | bytearray], keep: int) -> None:
    """Write `root`/step-<step> of these files, then drop all but the newest `keep`. Raises `MnistDistError`."""
    final, temporary = root / step_name(step), root / f".{step_name(step)}.{os.getpid()}"
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[MANIFEST] = json.dumps({"step": step, **checksums}).encode()
    try:
        make_folder(root, parents=False)  # a run's folder that is gone is not made again
        _remove_left(root)
        make_folder(temporary, parents=False)
        for name, content in files.items():
            write_synced(temporary / name, content)
        sync_folder(temporary)
        remove_tree(final)  # if one of the same step is there, it is damaged, or it would have been resumed from
        rename(temporary, final)
        sync_folder(root)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove_tree(temporary)
        raise MnistDistError(f"the checkpoint of step {step} could not be written to {root} ({cause(error)}); the ones "
                             "before it are whole: free some space and continue with --resume") from None
    _drop_old(root, step, keep)


def _remove_left(root: Path) -> None:
    """Remove what a process left behind that was killed while it wrote a checkpoint."""
    for name in names_in(root):
        if name.startswith(".step-"):
            with contextlib.suppress(OSError):  # what cannot be removed does no harm
                remove_tree(root / name)


def _drop_old(root: Path, step: int, keep: int) -> None:
    """Drop all but the newest `keep` up to this step: a later one is damaged, or it would have been resumed from."""
    with contextlib.suppress(OSError):  # what cannot be removed now is removed with the next checkpoint
        for old in [folder for folder in _newest_first(root) if 0 <= _step_of(folder) < step][keep - 1 :]:
            remove_tree(old)


def step_name(step: int) -> str:
    """The name of the folder of this step's checkpoint."""
    return f"step-{step:09d}"


def _newest_first(root: Path) -> list[Path]:
    """All folders with the name of a checkpoint, the newest first; names without a number come last."""
    folders = [root / name for name in names_in(root) if name.startswith("step-")]
    return sorted(folders, key=lambda path: (_step_of(path), path.name), reverse=True)


def _step_of(folder: Path) -> int:
    """The step that the name says; -1 if it says none."""
    match = re.fullmatch(r"step-(\d{9,18})", folder.name, re.ASCII)
    return int(match[1]) if match else -1


def load_newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint below `root`, or None. `warn` gets a line for each damaged one."""
    for folder in _newest_first(root):
        try:
            return _load(folder)
        # RecursionError: of JSON with very many brackets; AttributeError, RuntimeError: of tensors of unknown types
        except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError, RuntimeError,
                SafetensorError) as error:
            warn(f"checkpoint {folder} is damaged ({cause(error)}): skipped")
    return None


def _load(folder: Path) -> Checkpoint:
    """The checkpoint of this folder. Raises many kinds of error if it is not what was written."""
    if folder.is_symlink():
        raise ValueError("it is a symbolic link")
    manifest = read_json(folder / MANIFEST, MEGABYTE)
    if manifest["step"] != _step_of(folder):
        raise ValueError(f"its manifest is of step {manifest['step']}")
    files = {TENSORS: read_limited(folder / TENSORS), STATE: read_limited(folder / STATE, JSON_LIMIT)}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != manifest[name]:
            raise ValueError(f"{name} does not match its checksum")
    state = json.loads(files[STATE])
    if not isinstance(state, dict):
        raise TypeError(f"{STATE} is a {type(state).__name__}")
    return Checkpoint(folder, load(files[TENSORS]), state)
