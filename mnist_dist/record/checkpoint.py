"""Checkpoints that are whole or absent: tensors as safetensors, the rest as JSON, a manifest of checksums last.

A checkpoint is written to a temporary folder, synced, and renamed. If one does not match its manifest, a warning names
it and the one before it is read. Nothing is unpickled. One process writes; it knows nothing of the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mnist_dist.errors import MnistDistError
from mnist_dist.record.files import sync_folder, write_synced

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class Checkpoint(NamedTuple):
    """A checkpoint that was read: its folder, the tensors, and the rest of the state."""

    folder: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as one safetensors file."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def save_checkpoint(root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write `root`/step-<step>, then drop all but the newest `keep`. Raises `MnistDistError` if the disk is full or
    cannot be written; the older checkpoints are then unchanged.
    """
    final, temporary = root / f"step-{step:09d}", root / f".step-{step:09d}.{os.getpid()}"
    files = {TENSORS: tensor_bytes(tensors), STATE: json.dumps(state, allow_nan=False).encode()}
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[MANIFEST] = json.dumps(checksums).encode()
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, content in files.items():
            write_synced(temporary / name, content)
        sync_folder(temporary)
        if final.exists():  # of the same step, and damaged, or it would have been resumed from
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise MnistDistError(f"the checkpoint of step {step} could not be written to {root} ({error}); the ones before "
                             "it are whole: free some space and continue with --resume") from None
    for old in _newest_first(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _newest_first(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"), reverse=True) if root.is_dir() else []


def load_newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint below `root`, or None. `warn` gets a line for each damaged one."""
    from safetensors.torch import load

    for folder in _newest_first(root):
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            files = {name: (folder / name).read_bytes() for name in (TENSORS, STATE)}
            for name, content in files.items():
                if hashlib.sha256(content).hexdigest() != manifest[name]:
                    raise ValueError(f"{name} does not match its checksum")
            return Checkpoint(folder, load(files[TENSORS]), json.loads(files[STATE]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"checkpoint {folder} is damaged ({error}): skipped")
    return None
