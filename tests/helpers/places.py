"""Numbers the places at which a command writes, renames or removes a file below a folder, and kills it at one of them.

A place is a call site of the package and the number of its visit, before a file is opened for writing, after that and
before anything is written, and before a name is made, changed or removed. Python's audit events tell of them, whatever
function of Python's is called, so no writer of the package can be missed.
PLACES_BELOW is the folder; PLACES_IN a file that gets a line for each place; KILL_AT the place at which to kill. Or
KILL_AFTER are the seconds after which rank KILLS_RANK is killed, wherever it is; the file KILLED then says so.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mnist_dist

PACKAGE = str(Path(mnist_dist.__file__).parent)
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
FILES = os.path.join(PACKAGE, "disk", "files.py")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Places:
    """What this process does below `root`: `visit` records each place, and kills the process at the chosen one."""

    def __init__(self, root: str, record: str, kill_at: str) -> None:
        self.root, self.kill_at = os.path.abspath(root), kill_at
        self.file = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.visits: Counter[str] = Counter()
        self.lock, self.local = threading.Lock(), threading.local()

    def is_below(self, path: object, dir_fd: object = -1) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        if isinstance(dir_fd, int) and dir_fd >= 0:  # as shutil.rmtree names what it removes
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fsdecode(path))
        path = os.path.abspath(os.fsdecode(path))
        return path == self.root or path.startswith(self.root + os.sep)

    def visit(self, what: str) -> None:
        ours = []  # the calls within the package, the innermost first
        frame = sys._getframe(2)
        while frame:
            if frame.f_code.co_filename.startswith(PACKAGE):
                ours.append(frame)
            frame = frame.f_back
        if not ours:  # another library's own
            return
        # who calls a helper of files.py is the one who writes
        writer = next((one for one in ours if one.f_code.co_filename != FILES), ours[0])
        names = [f"{os.path.relpath(one.f_code.co_filename, PACKAGE)}:{one.f_lineno}" for one in (ours[0], writer)]
        site = f"{what} {' for '.join(dict.fromkeys(names))}"
        with self.lock:
            self.visits[site] += 1
            place = f"{site} #{self.visits[site]}"
            os.write(self.file, f"{place}\n".encode())
            if place == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event: str, words: tuple) -> None:
        if event == "open" and isinstance(words[2], int) and words[2] & WRITES:
            # our own opener tells of it with the folder's handle, which this event lacks
            if not getattr(self.local, "opens", False) and self.is_below(words[0]):
                self.visit("open")
        elif event in CHANGES:
            dir_fds = words[2:4] if event == "os.rename" else words[-1:]
            if any(map(self.is_below, words[:2] if event == "os.rename" else words[:1], dir_fds)):
                self.visit(event)

    def install(self) -> None:
        sys.addaudithook(self.hook)
        before = os.open

        def opened(path: str, flags: int, *words: int, **named: int) -> int:
            writes = flags & WRITES and self.is_below(path, named.get("dir_fd", -1))
            if writes:
                self.visit("open")
            self.local.opens = True
            try:
                descriptor = before(path, flags, *words, **named)
            finally:
                self.local.opens = False
            if writes:
                self.visit("opened")
            return descriptor

        os.open = opened


def end() -> None:
    """Kill this process, and leave a file that says so."""
    Path(os.environ["KILLED"]).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def main(argv: Sequence[str]) -> int:
    """As `mnist_dist.cli.main`, with its places numbered; W&B is the stand-in."""
    import hanging_wandb

    sys.modules["wandb"] = hanging_wandb
    if "PLACES_BELOW" in os.environ:
        Places(os.environ["PLACES_BELOW"], os.environ["PLACES_IN"], os.environ.get("KILL_AT", "")).install()
    if os.environ.get("KILL_AFTER") and os.environ.get("RANK", "0") == os.environ["KILLS_RANK"]:
        timer = threading.Timer(float(os.environ["KILL_AFTER"]), end)
        timer.daemon = True  # it holds no process back that ends before
        timer.start()
    from mnist_dist import cli

    return cli.main(argv)
