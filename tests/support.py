"""What several test files share: small IDX folders, and the command line run in processes of its own."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "train.py")


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


def run(command: Sequence[object], *, cwd: Path, timeout: float = 120, **environment: str
        ) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as a person would, with what it printed. It never reaches W&B or reads a keyboard."""
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, text=True, capture_output=True,
        timeout=timeout, stdin=subprocess.DEVNULL,
    )


def mnist_dist(*words: object, cwd: Path, timeout: float = 120, **environment: str
               ) -> subprocess.CompletedProcess[str]:
    """Run `mnist-dist WORDS`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return run([sys.executable, "-m", "mnist_dist", *words], cwd=cwd, timeout=timeout, PYTHONPATH=path, **environment)


def result_of(folder: Path) -> dict[str, Any]:
    """A run's `result.json`."""
    return json.loads((folder / "result.json").read_text())


def assert_one_line_error(done: subprocess.CompletedProcess[str], *needles: str, status: int = 2) -> None:
    """The command ended with `status` and one line on standard error that holds all the needles."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1 and lines[0].startswith("mnist-dist: error: "), done.stderr
    for needle in needles:
        assert needle in lines[0], f"{needle!r} is not in: {lines[0]}"
