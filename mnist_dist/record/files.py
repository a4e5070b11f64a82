"""Files that are whole or absent: written, synced to the disk, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_synced(path: Path, content: bytes | bytearray) -> None:
    """Write a file and wait until it is on the disk. Its mode follows the user's umask."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader finds the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_synced(temporary, content)
    os.replace(temporary, path)
    sync_folder(path.parent)


def replace_json(path: Path, values: Any) -> None:
    """Replace a file by these values as JSON, atomically. Raises `ValueError` if a number is not finite."""
    replace_synced(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's list of names is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
