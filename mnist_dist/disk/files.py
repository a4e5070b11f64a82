"""Files that are whole or absent: written, synced to the disk, then renamed. No symbolic link is followed.

A folder of a run or a study may come from others. Every write, rename and removal goes through handles of folders,
opened one below the other without following symbolic links. So the caller resolves the folder that a person names, and
what is below it stays below it.

In one file, because all access to the disk is here: a review of its safety reads this file alone.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from mnist_dist.text import cut, whole

MEGABYTE = 1_000_000
LIMIT = 500 * MEGABYTE  # of a file that is read: a hundred times what a long run leaves
JSON_LIMIT = 30 * MEGABYTE  # as values in memory it takes up to 24 times as much; 10,000 epochs have less
_SEARCH = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


@contextmanager
def _folder(path: Path, *, create: bool = False) -> Iterator[int]:
    """A handle of the folder. No component of its path may be a symbolic link. With `create`, missing folders are made.
    Raises `OSError`.
    """
    handle = os.open("/" if path.is_absolute() else ".", _SEARCH)
    try:
        for name in path.parts[path.is_absolute() :]:
            inner = _inner(name, handle, path, create)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def _inner(name: str, handle: int, path: Path, create: bool) -> int:
    try:
        return os.open(name, _SEARCH, dir_fd=handle)
    except FileNotFoundError as error:
        if not create:
            raise _named(error, name, handle, path) from None
    except OSError as error:
        raise _named(error, name, handle, path) from None
    with suppress(FileExistsError):  # another process was first
        os.mkdir(name, dir_fd=handle)
    return _inner(name, handle, path, create=False)


def _named(error: OSError, name: str, handle: int, path: Path) -> OSError:
    """The error with the whole path; if a link is the reason, it says so."""
    with suppress(OSError):
        if stat.S_ISLNK(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode):
            return OSError(errno.ELOOP, f"{cut(name)} is a symbolic link, and no link is followed here", str(path))
    return OSError(error.errno, error.strerror, str(path))


def open_file(path: Path, flags: int) -> int:
    """A descriptor of a regular file, opened with these flags; its mode follows the umask. Raises `OSError`."""
    with _folder(path.parent) as folder:
        try:
            # without O_NONBLOCK, opening a pipe waits for its other end
            descriptor = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666,
                                 dir_fd=folder)
        except OSError as error:
            raise _named(error, path.name, folder, path) from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """As `open_file`, and closes the descriptor."""
    descriptor = open_file(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def real(path: Path) -> Path:
    """The folder that a person names, by a path in which no component is a symbolic link."""
    resolved = path.resolve()
    return path if resolved == Path(os.path.abspath(path)) else resolved


def make_folder(path: Path, *, parents: bool = True) -> None:
    """Make the folder, and with `parents` those above it, where they are missing. Raises `OSError`."""
    with _folder(path if parents else path.parent, create=parents) as folder:
        if not parents:
            os.close(_inner(path.name, folder, path, create=True))


def write_synced(path: Path, content: bytes | bytearray) -> None:
    """Write a file and wait until it is on the disk."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
        _write(descriptor, content)
        os.fsync(descriptor)


def _write(descriptor: int, content: bytes | bytearray) -> None:
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)


def replace_synced(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader finds the old content or the new one, never a part. Removes what a process
    has left that was killed in here.
    """
    remove_left(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(temporary, content)
        rename(temporary, path)
    except OSError:
        remove(temporary)
        raise
    sync_folder(path.parent)


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another path; a file there is replaced, and an empty folder. Raises `OSError`."""
    with _folder(path.parent) as folder, _folder(target.parent) as other:
        os.replace(path.name, target.name, src_dir_fd=folder, dst_dir_fd=other)


def remove(path: Path) -> None:
    """Remove a file or a link, if it is there."""
    with suppress(FileNotFoundError), _folder(path.parent) as folder:
        os.unlink(path.name, dir_fd=folder)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, or a file or link; nothing happens if it is not there. Raises `OSError`.
    """
    with suppress(FileNotFoundError), _folder(path.parent) as folder:
        _remove_tree(path.name, folder)


def _remove_tree(name: str, folder: int) -> None:
    try:
        inner = os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    except NotADirectoryError:
        os.unlink(name, dir_fd=folder)
        return
    try:
        for entry in os.listdir(inner):
            _remove_tree(entry, inner)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=folder)


def remove_left(path: Path) -> None:
    """Remove what a process that was killed in `replace_synced` has left beside the file."""
    start = f".{path.name}."
    for name in names_in(path.parent):
        number = name.removeprefix(start) if name.startswith(start) else ""
        if (pid := whole(number)) is not None and not psutil.pid_exists(pid):
            with suppress(OSError):
                remove(path.with_name(name))


def names_in(folder: Path) -> list[str]:
    """The names in the folder; none if it is not there, or is a link."""
    with suppress(OSError), _readable(folder) as handle:
        return os.listdir(handle)
    return []


@contextmanager
def _readable(path: Path) -> Iterator[int]:
    with _folder(path) as folder:
        handle = os.open(".", os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        yield handle
    finally:
        os.close(handle)


def replace_json(path: Path, values: Any) -> None:
    """Replace a file by these values as JSON, atomically. Raises `ValueError` if a number is not finite."""
    replace_synced(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Append a line, or several, each ending with a newline, in one write."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        _write(descriptor, line.encode())


def cut_lines(path: Path, is_kept: Callable[[bytes], bool]) -> None:
    """Cut a file, if it is there, before its first line that is not kept or not whole."""
    with suppress(FileNotFoundError), opened(path, os.O_RDWR) as descriptor:
        with open(descriptor, "rb", closefd=False) as file:
            end = 0
            while (line := file.readline(MEGABYTE)).endswith(b"\n") and is_kept(line):
                end += len(line)
        if end < os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, end)
            os.fsync(descriptor)


def read_limited(path: Path, limit: int = LIMIT) -> bytes:
    """The content of a regular file of at most `limit` bytes, which may come from anywhere. Raises `OSError` if it is
    larger, or something else: a symbolic link, a folder, a pipe that would never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes, and at most {limit:,} are read", str(path))
        return file.read(status.st_size)  # the limit on memory is this number, also if the file grows meanwhile


def opened_regular(path: Path) -> BinaryIO:
    """A file that a person names, opened for reading; links are followed. Raises `OSError` if it is not a regular file,
    such as a pipe that nobody writes to.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """What a JSON file holds. Raises `OSError` as `read_limited`, and `ValueError` if it is not JSON."""
    try:
        return json.loads(read_limited(path, limit))
    except RecursionError:
        raise ValueError("too many brackets within each other") from None


def read_json_lines(path: Path, limit: int = JSON_LIMIT) -> list[Any]:
    """What each line of a file of lines of JSON holds. Raises `OSError` as `read_limited`, and `ValueError`."""
    try:
        return [json.loads(line) for line in read_limited(path, limit).splitlines()]
    except RecursionError:
        raise ValueError("too many brackets within each other") from None


def sync_folder(folder: Path) -> None:
    """Wait until the folder's list of names is on the disk."""
    with _readable(folder) as handle:
        os.fsync(handle)
