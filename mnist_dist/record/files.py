"""Files that are whole or absent: written, synced to the disk, then renamed. No symbolic link is followed to a file."""

from __future__ import annotations

import errno
import glob
import json
import os
import stat
from pathlib import Path
from typing import Any

import psutil

MEGABYTE = 1_000_000
LIMIT = 500 * MEGABYTE  # of a file that is read: a hundred times what a long run leaves


def write_synced(path: Path, content: bytes | bytearray) -> None:
    """Write a file and wait until it is on the disk. Its mode follows the user's umask."""
    with open(path, "wb", opener=_opened) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader finds the old content or the new one, never a part. Removes what a process
    has left that was killed in here.
    """
    remove_left(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_left(path: Path) -> None:
    """Remove what a process that was killed in `replace_synced` has left beside the file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if left.suffix[1:].isdecimal() and not psutil.pid_exists(int(left.suffix[1:])):
            left.unlink(missing_ok=True)


def replace_json(path: Path, values: Any) -> None:
    """Replace a file by these values as JSON, atomically. Raises `ValueError` if a number is not finite."""
    replace_synced(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Append a line, which ends with a newline, in one write."""
    with open(path, "ab", opener=_opened) as file:
        file.write(line.encode())


def read_limited(path: Path, limit: int = LIMIT) -> bytes:
    """The content of a regular file of at most `limit` bytes, which may come from anywhere. Raises `OSError` if it is
    larger, or something else: a symbolic link, a folder, a pipe that would never end.
    """
    with open(path, "rb", opener=_opened) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"has {found.st_size:,} bytes, and at most {limit:,} are read", str(path))
        return file.read(found.st_size)  # of a number, as much memory is taken, whatever there is to read


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """What a JSON file holds. Raises `OSError` as `read_limited`, and `ValueError` if it is not JSON."""
    try:
        return json.loads(read_limited(path, limit))
    except RecursionError:
        raise ValueError("too many brackets within each other") from None


def sync_folder(folder: Path) -> None:
    """Wait until the folder's list of names is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _opened(path: str, flags: int) -> int:
    # without O_NONBLOCK, opening a pipe waits for its other end
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
