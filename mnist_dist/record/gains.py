"""What compiling the step saves on a GPU, as `launch/qualify.sh` has measured it: numbers that `--compile auto` reads.

They are kept for each kind of GPU in the user's cache, `~/.cache/mnist_dist/gpus.json`. Needs no torch.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mnist_dist.record.files import replace_json


@dataclass(frozen=True)
class Gain:
    """Seconds that compiling takes, and that each step then saves: the least over the measured batch sizes."""

    compile_seconds: float
    saved_seconds_per_step: float
    torch: str

    def pays(self, steps: float) -> bool:
        """Whether so many steps save more time than compiling takes."""
        return steps * self.saved_seconds_per_step > self.compile_seconds


def gains_file() -> Path:
    """In the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mnist_dist", "gpus.json")


def read_gain(device_name: str) -> Gain | None:
    """Of this kind of GPU; None if it has not been measured, or the file cannot be read."""
    try:
        return Gain(**json.loads(gains_file().read_bytes())[device_name])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_gain(device_name: str, gain: Gain) -> Path:
    """Write it, beside those of other devices; returns the file."""
    path = gains_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        others = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        others = {}
    replace_json(path, {**others, device_name: asdict(gain)})
    return path


def gain_from(rows: Iterable[Mapping[str, Any]]) -> Gain | None:
    """From the rows of a study with plain and compiled steps; None if no cell has both."""
    seconds: dict[tuple[int, int], dict[str, list[float]]] = {}
    compiling, version = [0.0], ""
    for row in rows:
        if row["status"] != "completed" or not row["summary"]["samples_per_second"]:
            continue
        cell = seconds.setdefault((row["global_batch_size"], row["processes"]), {"plain": [], "compiled": []})
        if (kind := row["environment"]["step"]) in cell:
            cell[kind].append(row["global_batch_size"] / row["summary"]["samples_per_second"])
            compiling.append(row["summary"]["compile_seconds"])
            version = row["environment"]["torch"]
    saved = [statistics.median(cell["plain"]) - statistics.median(cell["compiled"])
             for cell in seconds.values() if cell["plain"] and cell["compiled"]]
    return Gain(max(compiling), min(saved), version) if saved else None
