"""The command line: finds the command, whose file has its options, and ends with an exit status.

Every expected failure is one line on standard error and an exit status: 2 the command line or the data is wrong,
3 training diverged, 130 and 143 a signal, 1 anything else. No help and no error of the command line imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn

from mnist_dist import __version__
from mnist_dist.config import TrainConfig, flag_of
from mnist_dist.errors import LocalError, MnistDistError, UserError
from mnist_dist.options import Parser
from mnist_dist.output import complain, protect, say
from mnist_dist.processes.launch_environment import Launch, read_launch
from mnist_dist.processes.stop_signals import block_ignored, ending, number_of
from mnist_dist.text import cut, is_text, without_passwords
from mnist_dist.worker import any_left

CLOSE = 0.8  # likeness of an unknown option to a known one, from which on that one is meant


class Command(NamedTuple):
    """A command: what it does, and how its arguments without a dash are named. Its file has `add_options` and `run`."""

    help: str
    positional: str = ""
    reads_launch: bool = True  # a command that does not runs also where a launcher's variables contradict each other


COMMANDS = {
    "train": Command("train on one process, or on several"),
    "predict": Command("classify image files, or 16 random test images, with a run's model", "RUN_DIR [IMAGE ...] ",
                       reads_launch=False),
    "show": Command("look at the data and the untrained model, as the tutorial does", reads_launch=False),
    "lesson": Command("what a mini-batch changes, measured here in 90 seconds: one picture, five sentences"),
    "reproduce": Command("run the tutorial's two trainings and print its numbers beside ours"),
    "doctor": Command("is this machine, or this launch, fit for a study: each problem with its remedy"),
    "study": Command("a scaling study: throughput over batch sizes and processes; continues where it stopped"),
    "report": Command("draw a study's report again, or compare two studies cell by cell", "STUDY_DIR [STUDY_DIR] ",
                      reads_launch=False),
}


class Version(argparse.Action):
    """Prints the versions without importing the packages."""

    def __call__(self, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        names = [f"mnist-dist {__version__}"]
        for name in ("torch", "accelerate"):
            try:
                names.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                names.append(f"{name} is not installed")
        say(", ".join(names))
        raise SystemExit(0)


def _module(command: str) -> Any:
    return importlib.import_module(f"mnist_dist.commands.{command}")


def build_parser(with_options: Iterable[str] = COMMANDS) -> Parser:
    """The command line, with the options of these commands."""
    parser = Parser(prog="mnist-dist", description="Distributed MNIST training: exact on any number of processes, and "
                    "measured.", allow_abbrev=False)
    parser.add_argument("--version", action=Version, nargs=0, help="print the versions of mnist-dist, torch and "
                        "accelerate")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (help, positional, _) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False,
                                      usage=f"mnist-dist {name} {positional}[OPTIONS]")
        if name in with_options:
            _module(name).add_options(command)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Raises `UserError`; an unknown option is answered with the nearest known one."""
    parser = build_parser(argv[:1])
    words: list[str] = []
    end = argv.index("--") if "--" in argv and argv[0] == "study" else len(argv)  # the rest is for --script
    argv, rest = argv[:end], argv[end + 1 :]
    for word in argv:
        if not is_text(word):
            raise UserError(f"{cut(word)} has control characters, or bytes that are no text: rename it")
        if re.fullmatch(r"--local[-_]rank=\d+", word):  # of torch.distributed.launch, which sets LOCAL_RANK too
            continue
        if match := re.match(r"--[a-z][a-z_-]*", word):  # --batch_size is --batch-size
            word = _switch(match[0].replace("_", "-") + word[match.end():])
        if words and re.fullmatch(r"-[\d.].*", word) and re.fullmatch(r"--[a-z-]+", words[-1]):
            words[-1] += f"={word}"  # a negative number is a value: let its check speak of it
        else:
            words.append(word)
    args, unknown = parser.parse_known_args(words)
    if args.command is None:
        parser.error(f"a command is needed: {', '.join(COMMANDS)}")
    if unknown:
        commands: Any = next(action.choices for action in parser._actions if action.dest == "command")
        known = [flag for action in commands[args.command]._actions for flag in action.option_strings]
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, known, n=1, cutoff=CLOSE) or [
            flag for flag in known if len(name) > 3 and (flag.startswith(name) or flag.endswith(name[1:]))]
        hint = f"did you mean {near[0]}?" if near else f"mnist-dist {args.command} --help lists the options"
        raise UserError(f"unknown option {cut(unknown[0])}: {hint}")
    args.rest = rest
    return args


def _switch(word: str) -> str:
    """`--shuffle=False`, as sweeps write it, is `--no-shuffle`."""
    name, _, value = word.partition("=")
    meant = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(value.lower())
    switches = {flag_of(option.name) for option in fields(TrainConfig) if option.metadata["kind"] is bool}
    if meant is None or name not in switches:
        return word
    return name if meant else name.replace("--", "--no-", 1)


def run(argv: Sequence[str], launch: Launch | None = None) -> int:
    """Carry out a command; returns the exit status. `launch` is read from the environment unless it is given.

    Raises `MnistDistError`.
    """
    args = parse(argv)
    if launch is None:
        launch = read_launch() if COMMANDS[args.command].reads_launch else Launch()
    return _module(args.command).run(args, argv, launch)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: returns the exit status, or ends the process if a normal exit could wait for ever, or crash."""
    # torch warns of each address that has no name: without a name server that is every one
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    protect()
    block_ignored()
    words = sys.argv[1:] if argv is None else argv
    sys.argv[1:] = map(without_passwords, sys.argv[1:])  # W&B writes it down
    status, at_once = _status(words)
    if at_once or any_left():  # Python's exit would wait for a W&B that does not answer
        sys.stdout.flush()
        os._exit(status)
    return status


def _status(argv: Sequence[str]) -> tuple[int, bool]:
    """The exit status of a command, and whether the process must end at once: one of several must. Python's exit would
    wait for processes that are lost; and gloo's threads, which live as long as the process, can crash it ("terminate
    called without an active exception"). A failure is one line on standard error.
    """
    launch = None
    with contextlib.suppress(UserError):  # `run` raises it again if the command needs a launch
        launch = read_launch()
    process = launch or Launch()
    at_once = process.size > 1

    def say_stopped(number: int) -> None:
        if process.says_errors:
            complain("error", f"stopped by {signal.Signals(number).name}: the same command starts again")

    try:
        with ending(say_stopped):
            return run(argv, launch), at_once
    except MnistDistError as error:
        if isinstance(error, LocalError) or process.says_errors:
            complain("error", error)
        else:
            time.sleep(1.0)  # a launcher ends rank 0 when this one ends, and rank 0 has a line to print
        is_final = error.exit_status == MnistDistError.exit_status and not isinstance(error, LocalError)
        return process.final_status if is_final else error.exit_status, at_once
    except KeyboardInterrupt as stop:
        say_stopped(number_of(stop))
        return 128 + number_of(stop), at_once
    except (OSError, MemoryError) as error:  # of a kind that no command expects
        name, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        complain("error", f"{reason or str(error) or 'no memory left'}{f': {cut(name)}' if name else ''}")
        return MnistDistError.exit_status, at_once
    except Exception:
        if process.size == 1:
            raise
        traceback.print_exc()
        return 1, True
