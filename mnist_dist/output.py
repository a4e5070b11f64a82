"""What the package prints. Output that cannot be written is dropped: a full disk, a reader that has left or a terminal
that is closed ends no command. Control characters are escaped, so that no file name or option reaches a terminal as a
code.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import shutil
import sys
import textwrap

from mnist_dist.text import one_line, printable

BLOCKED_SECONDS = 5.0  # for a reader that has asked not to be waited for, as some terminals do


class Output(io.FileIO):
    """A file descriptor to write to, which takes everything and never fails."""

    def write(self, content) -> int:  # type: ignore[no-untyped-def, override]
        """Write all of it, or drop what cannot be written."""
        rest = memoryview(content).cast("B")
        with contextlib.suppress(OSError):
            while rest:
                written = super().write(rest)
                if written is None and not select.select([], [self], [], BLOCKED_SECONDS)[1]:
                    break
                rest = rest[written or 0 :]
        return memoryview(content).nbytes


def protect() -> None:
    """From now on nothing that is printed ends the process: whatever standard output and error are, if anything.

    Closed descriptors become /dev/null: a file that is opened later would take their numbers, and get what torch
    prints.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream, encoding = getattr(sys, name), "utf-8"
        if stream is not None:
            if stream is not getattr(sys, f"__{name}__"):  # that of a notebook or a test
                continue
            number, encoding = stream.fileno(), stream.encoding
            with contextlib.suppress(OSError):
                stream.flush()
        raw = Output(number, "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(
            io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=name == "stderr" or raw.isatty()))


def columns() -> int:
    """Characters in a line of the terminal: as COLUMNS says, else the terminal, else 80."""
    return shutil.get_terminal_size().columns


def say(text: object = "", *, end: str = "\n", is_error: bool = False) -> None:
    """Print lines at once, on standard output or standard error. On a terminal a long line continues below, between two
    words.
    """
    stream = sys.stderr if is_error else sys.stdout
    lines = [printable(line) for line in str(text).split("\n")]
    if stream.isatty():
        lines = [part for line in lines for part in wrapped(line, columns())]
    print("\n".join(lines), end=end, flush=True, file=stream)


def wrapped(line: str, width: int) -> list[str]:
    """The line in parts of at most `width` characters, cut between words, the second and later ones indented by two
    more than the first. A longer word stays whole: a path can then be copied.
    """
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, width, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False,
                         replace_whitespace=False, drop_whitespace=True) if len(line) > width else [line]


def complain(kind: str, message: object) -> None:
    """A line on standard error: `mnist-dist: KIND: MESSAGE`, where the kind is error or warning."""
    say(f"mnist-dist: {kind}: {one_line(str(message))}", is_error=True)
