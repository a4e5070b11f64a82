"""The ways a command can end early, each with its exit status. A message is one line for the person at the keyboard."""

from __future__ import annotations

import signal


class MnistDistError(Exception):
    """An expected end: `exit_status` is what the process returns, the message is all that is printed."""

    exit_status = 1


class UserError(MnistDistError):
    """The command line, a file or the launch is wrong. The message names the value, what is allowed, and what to do."""

    exit_status = 2


class Diverged(MnistDistError):
    """The training loss became NaN or infinite."""

    exit_status = 3


class LocalError(MnistDistError):
    """What the other processes of the run do not know, so that this one tells it, and waits for none of them."""


class NotJoined(LocalError):
    """This process could not join the others."""

    exit_status = 2


class LostProcess(LocalError):
    """Another process of the run died or stopped answering."""


class Stopped(MnistDistError):
    """A signal ended the run, after a checkpoint. The exit status is the shell's: 128 + signal number."""

    def __init__(self, signal_number: int, step: int, what_next: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}: {what_next}")
        self.exit_status = 128 + signal_number
