"""What compiling the step saves on a GPU, as `launch/qualify.sh` has measured it: numbers that `--compile auto` reads.

They are kept for each kind of GPU in the user's cache, `~/.cache/mnist_dist/gpus.json`. Needs no torch.
"""

from __future__ import annotations

import errno
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mnist_dist.disk.files import make_folder, read_json, real, replace_json


@dataclass(frozen=True)
class Gain:
    """Seconds that compiling takes, and that each step then saves: the least over the measured batch sizes."""

    compile_seconds: float
    saved_seconds_per_step: float
    torch: str

    def pays(self, steps: float) -> bool:
        """Whether `steps` steps save more time than compiling takes."""
        return steps * self.saved_seconds_per_step > self.compile_seconds


def user_cache() -> Path:
    """Our folder in the user's cache. Raises `OSError` if the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mnist_dist")
    except RuntimeError:
        raise OSError(errno.ENOENT, "the user has no home: set HOME or XDG_CACHE_HOME", "~/.cache") from None


def gains_file() -> Path:
    """In the user's cache."""
    return real(user_cache()) / "gpus.json"


def read_gain(device_name: str) -> Gain | None:
    """Of this kind of GPU; None if it has not been measured, or the file cannot be read."""
    try:
        return Gain(**read_json(gains_file())[device_name])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_gain(device_name: str, gain: Gain) -> Path:
    """Write it, beside those of other devices; returns the file."""
    path = gains_file()
    make_folder(path.parent)
    try:
        others = dict(read_json(path))
    except (OSError, ValueError, TypeError):
        others = {}
    replace_json(path, {**others, device_name: asdict(gain)})
    return path
