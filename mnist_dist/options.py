"""Options of commands: a parser whose errors are one line, readers of values, and the options of training.

Readers raise `ValueError` with the end of the sentence "--option must be …".
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from mnist_dist.config import HEADINGS, TrainConfig, flag_of
from mnist_dist.errors import UserError
from mnist_dist.text import cut, whole

T = TypeVar("T")
MOST = 10**18  # of a whole number
SHARED = ("dataset", "data_dir", "mirror", "seed")  # options of training that most commands have


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`."""
        if wrong := re.match(r"argument (?:.*/)?(\S+): (must be .*)", message, re.DOTALL):
            raise UserError(f"{wrong[1]} {wrong[2]}")
        raise UserError(f"{message} (see {self.prog} --help)")


def add_training(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add options of training, in groups. They are read as text and checked by `TrainConfig`; an option that is not
    typed is not set.
    """
    heading, group = "", None
    for option in fields(TrainConfig):
        heading = HEADINGS.get(option.name, heading)
        if option.name not in names:
            continue
        if group is None or group.title != heading:
            group = parser.add_argument_group(heading)
        rule = option.metadata
        described = rule["help"].replace("%", "%%")
        if option.default is not None and not isinstance(option.default, bool):
            described += f" (default {option.default})"
        extra: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": option.name}
        if rule["kind"] is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["metavar"] = "{" + ",".join(rule["choices"]) + "}" if "choices" in rule else (
                rule["metavar"] or {int: "N", float: "X", str: "TEXT"}[rule["kind"]])
        group.add_argument(flag_of(option.name), help=described, **extra)


def reader(read: Callable[[str], T]) -> Callable[[str], T]:
    """A `type=` of argparse from a function of the text. Its `ValueError` has the rule: "--option must be RULE"."""
    def value(text: str) -> T:
        try:
            return read(text.strip())
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {error}, got {cut(text)!r}") from None

    return value


def typed(read: Callable[[str], object]) -> Callable[[str], str]:
    """A `type=` of argparse that checks the text and keeps it, so that a message can say what was typed."""
    check = reader(read)

    def keep(text: str) -> str:
        check(text)
        return text

    return keep


def several(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Values separated by commas, each once."""
    def every(text: str) -> tuple[T, ...]:
        try:
            return tuple(dict.fromkeys(read(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise ValueError(f"{error}, or some of these separated by commas") from None

    return every


def whole_from(minimum: int, maximum: int = MOST) -> Callable[[str], int]:
    """Reads a whole number."""
    def read(text: str) -> int:
        number = whole(text)
        if number is None or not minimum <= number <= maximum:
            limits = f"at least {minimum}" if maximum == MOST else f"from {minimum} to {maximum:,}"
            raise ValueError(f"a whole number {limits}")
        return number

    return read


def seconds(text: str) -> float:
    """A number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError("a number of seconds above 0")
    return value


def duration(text: str) -> float:
    """`90s`, `30min` or `2h` in seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(s|min|h)", text, re.ASCII)
    if match is None or not float(match[1]):
        raise ValueError("a time above 0 with its unit, as in 90s, 30min or 2h")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def percent(text: str) -> float:
    """`5%` or `5 %` as 0.05."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not text.endswith("%") or not 0 < value < 100:
        raise ValueError("a percentage above 0 and below 100, as in 3%")
    return value / 100


def shell_words(text: str) -> tuple[str, ...]:
    """The words of a command line."""
    try:
        return tuple(shlex.split(text))
    except ValueError:  # a quotation mark that is not closed
        raise ValueError("options of sbatch as a shell reads them, with every quotation closed") from None
