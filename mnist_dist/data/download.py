"""Downloads a data set of torchvision's: all of it, or nothing at all."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one from Python 3.11 on
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mnist_dist.data.layouts import find
from mnist_dist.disk.files import make_folder, rename
from mnist_dist.disk.lock import FolderLock, Held
from mnist_dist.errors import UserError
from mnist_dist.text import cause, cut, without_passwords
from mnist_dist.worker import begun, within

TORCHVISION_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
LOCK_SECONDS = 3600.0  # for another process that fetches the same
STALL_SECONDS = 10.0  # without data, after which a mirror is given up
LEAST_BYTES_PER_SECOND = 5_000  # on average; a slower mirror is given up
MOST_BYTES = 50_000_000  # of a file: twice the largest one of these data sets
POLL_SECONDS = 0.5


def download(name: str, data_dir: Path, mirror: str | None) -> None:
    """Fetch the data set into torchvision's layout below `data_dir`: all of it, or nothing at all.

    torchvision has the mirrors and MD5 sums, and unpacks the files. The transfer is ours: torchvision requests each
    file twice, waits for ever for a silent server, and uses the partial file of an interrupted run as if it were whole.
    Until all files are there, they are in a temporary folder: in `data_dir`, or in its parent if it does not exist yet.
    A lock keeps other runs from fetching the same. Raises `UserError`.
    """
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION_CLASS[name])
    mirrors = _mirrors(kind, mirror)
    data_dir = data_dir.resolve()
    there = next(folder for folder in (data_dir, *data_dir.parents) if folder.is_dir())
    lock = FolderLock(there, f".{data_dir.name}.{name}.lock")
    try:
        lock.acquire(LOCK_SECONDS)
        with contextlib.ExitStack() as held:
            held.callback(lock.release)
            if find(data_dir, TORCHVISION_CLASS[name]) is not None:
                return
            with tempfile.TemporaryDirectory(prefix=".download-", dir=there) as root:
                raw = Path(root, TORCHVISION_CLASS[name], "raw")
                raw.mkdir(parents=True)
                for file_name, md5 in kind.resources:
                    _fetch_from_any(mirrors, file_name, md5, raw)
                kind(root, download=True)  # finds the archives whole: checks them, unpacks them
                for path in raw.iterdir():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                target = data_dir / TORCHVISION_CLASS[name]
                make_folder(target)
                rename(raw, target / "raw")  # fails if a folder of other files is in its place
    except Held as error:
        raise UserError(f"{error} has fetched {name} into --data-dir {data_dir} for {LOCK_SECONDS:g} s: end it, or "
                        "name another folder") from None
    except OSError as error:
        if find(data_dir, TORCHVISION_CLASS[name]) is not None:  # a run with its lock elsewhere was first
            return
        raise UserError(f"{name} cannot be stored in --data-dir {data_dir} ({cause(error)}): name another") from None


def answers(name: str, mirror: str | None) -> str | None:
    """Why the data set could not be downloaded now; None if a mirror offers it. Fetches the beginning of one file."""
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION_CLASS[name])
    failures = []
    for base in _mirrors(kind, mirror):
        try:
            if _begins(base + kind.resources[-1][0]) == b"\x1f\x8b":  # as gzip begins
                return None
            failures.append(f"{base}: sends something else")
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{base}: {_reason(error)}")
    return _first(failures)


def _begins(url: str) -> bytes:
    """The first two bytes there. Raises as `_fetch`, and `TimeoutError`."""
    def read() -> bytes:
        with urllib.request.urlopen(_request(url), timeout=STALL_SECONDS) as response:
            return response.read(2)

    return within(STALL_SECONDS, read)


def _mirrors(kind: Any, mirror: str | None) -> list[str]:
    """The base URLs to try: that of --mirror, then those of torchvision's class."""
    return [*([mirror.rstrip("/") + "/"] if mirror else []), *kind.mirrors]


def _request(url: str) -> urllib.request.Request:
    """The request for a URL, with its user and password where the server reads them."""
    request = urllib.request.Request(without_passwords(url))
    if user := urlsplit(url).username:  # urllib would take it for a part of the host's name
        secret = f"{unquote(user)}:{unquote(urlsplit(url).password or '')}"
        # not after a redirect, which may lead to another host
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(secret.encode()).decode()}")
    return request


def _fetch_from_any(mirrors: Sequence[str], file_name: str, md5: str, folder: Path) -> None:
    failures = []
    for mirror in mirrors:
        try:
            _fetch(mirror + file_name, md5, folder / file_name)
            return
        except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL, or damaged in transfer
            failures.append(f"{mirror}: {_reason(error)}")
            (folder / file_name).unlink(missing_ok=True)
    raise UserError(f"{file_name} could not be downloaded ({_first(failures)}): check --mirror, or put the files "
                    "there")


def _reason(error: Exception) -> str:
    """Why a request failed: of an error of urllib's that has another one inside, the inner one."""
    inner = getattr(error, "reason", None)
    return cause(inner) if isinstance(inner, BaseException) else str(error) or type(error).__name__


def _first(failures: Sequence[str]) -> str:
    """The first failure: of the mirror that is given, if one is."""
    others = len(failures) - 1
    more = f"; {others} more mirror{'s' * (others > 1)} failed too" if others else ""
    return cut(without_passwords(failures[0]), 120) + more


def _fetch(url: str, md5: str, path: Path) -> None:
    """Fetch a file. Raises `OSError`, `HTTPException` or `ValueError`, also if the mirror is slow, or sends too much.

    A mirror that sends a byte now and then passes every time limit of a socket. So a thread reads, and this
    thread checks how much has come.
    """
    transfer = Transfer(url, md5, path)
    future = begun(transfer.run)
    begin, before = time.monotonic(), 0
    while True:
        with contextlib.suppress(FutureTimeout):
            future.result(POLL_SECONDS)
        if future.done():
            return future.result()
        if time.monotonic() - begin > STALL_SECONDS:
            if transfer.received - before < STALL_SECONDS * LEAST_BYTES_PER_SECOND:
                transfer.is_given_up = True
                raise OSError(f"sends less than {LEAST_BYTES_PER_SECOND:,} bytes per second")
            begin, before = time.monotonic(), transfer.received


class Transfer:
    """A file on its way from a mirror to the disk."""

    def __init__(self, url: str, md5: str, path: Path) -> None:
        self.url, self.md5, self.path = url, md5, path
        self.received = 0  # bytes
        self.is_given_up = False  # by the one who waits for it

    def run(self) -> None:
        """Fetch the whole file. Raises as `_fetch`."""
        from tqdm import tqdm

        digest = hashlib.md5(usedforsecurity=False)
        with (
            urllib.request.urlopen(_request(self.url), timeout=STALL_SECONDS) as response,
            open(self.path, "wb") as file,
            tqdm(total=response.length, desc=self.path.name, unit="B", unit_scale=True, file=sys.stderr, leave=False,
                 disable=not sys.stderr.isatty()) as progress,
        ):
            while chunk := response.read1(1 << 16):
                self.received += len(chunk)
                if self.is_given_up:
                    return
                if self.received > MOST_BYTES:
                    raise ValueError(f"sends more than {MOST_BYTES:,} bytes")
                file.write(chunk)
                digest.update(chunk)
                progress.update(len(chunk))
        if digest.hexdigest() != self.md5:
            raise ValueError(f"sent {self.received} bytes whose MD5 is not {self.md5}")
