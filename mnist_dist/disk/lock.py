"""A lock on a folder: a file on which its holder has an flock, and in which it says who it is.

The operating system releases the lock when the process ends, however that happens. Linux and NFS have flock; on a file
system without it nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import time
from pathlib import Path

from mnist_dist.disk.files import open_file, remove
from mnist_dist.errors import MnistDistError

NAME = ".lock"
POLL_SECONDS = 0.05
LEAST_SECONDS = 0.5  # to wait for a holder that has not yet written who it is
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Held(Exception):
    """Another process has the lock; the text says which one, and on which host."""


class FolderLock:
    """The lock of an existing folder, held from `acquire` to `release`, or to the end of the process."""

    def __init__(self, folder: Path, name: str = NAME) -> None:
        self.folder, self.path = folder, folder / name
        self.is_locked = False  # whether the file system has locks
        self._descriptor = -1

    def acquire(self, wait_s: float = 0.0) -> None:
        """Take the lock; waits `wait_s` for another holder. Raises `Held`, and `OSError` if the file cannot be made."""
        deadline = time.monotonic() + max(wait_s, LEAST_SECONDS)
        while True:
            descriptor = open_file(self.path, os.O_RDWR | os.O_CREAT)
            try:
                is_free = self._lock(descriptor)
            except OSError:
                os.close(descriptor)
                raise
            if is_free and _is_at(descriptor, self.path):
                break
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if is_free:  # its holder has removed the file since it was opened
                continue
            if time.monotonic() > deadline:
                raise Held(holder or "another process")
            time.sleep(POLL_SECONDS)
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)

    def _lock(self, descriptor: int) -> bool:
        """Whether this process has the lock now, or nothing can have it. Raises `OSError` if the system fails."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_locked = True
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True

    def check(self) -> None:
        """Raises `MnistDistError` if the folder is no longer the one that was locked."""
        if self._descriptor >= 0 and not _is_at(self._descriptor, self.path):
            raise MnistDistError(f"{self.folder} was renamed or removed while this process wrote to it: nothing more "
                                 "is written; move it back, and continue with --resume")

    def release(self) -> None:
        """Give the lock back, and remove its file."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            if _is_at(self._descriptor, self.path):
                remove(self.path)
        os.close(self._descriptor)
        self._descriptor = -1


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at this path."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    return False
