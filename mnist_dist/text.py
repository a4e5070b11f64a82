"""Text from outside: numbers are read from it, and messages show it. What is shown is printable, short, and without
passwords.
"""

from __future__ import annotations

import re

MOST_OF_A_VALUE, MOST_OF_A_MESSAGE = 80, 400  # characters


def without_passwords(text: str) -> str:
    """The text, with every URL in it without its user and password: whatever is before the last @ of a word."""
    return re.sub(r"(?<=://)\S*@", "", text)


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped, as \\x1b: a terminal carries none of them out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_text(text: str) -> bool:
    """Whether it is what a person types: no control characters, and no bytes that are no text (lone surrogates)."""
    return not re.search("[\x00-\x1f\x7f\ud800-\udfff]", text)


def cut(value: object, most: int = MOST_OF_A_VALUE) -> str:
    """A value from outside as a message shows it: printable, and the middle of a long one left out."""
    text = printable(str(value))
    return text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[3 - most + most * 2 // 3:]}"


def cause(error: BaseException) -> str:
    """Why something failed, of at most 120 characters, without the file's name: the message around it has that."""
    text = error.strerror or str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return cut(" ".join(text.split()), 120)


def first_line(error: BaseException) -> str:
    """The first line of an error of torch's: without the place in the source of gloo, and gloo's advice after it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] |\.? This is typically caused by .*", "", line)


def one_line(text: str) -> str:
    """A message as it is printed: one printable line of at most 400 characters, without passwords."""
    return cut(" ".join(without_passwords(text).split()), MOST_OF_A_MESSAGE)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 step`, `2 steps`, `1,200 steps`; a plural that takes more than an s is given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def whole(text: str) -> int | None:
    """The whole number of at least 0 that the text is; None if it is none, or has more than 18 digits."""
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None
