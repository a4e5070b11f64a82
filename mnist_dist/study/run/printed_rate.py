"""The rate of a program that is not changed, from what it prints (`--rate-from`).

Each match is a window: programs print a rate after the same number of steps each time, so that all windows have the
same work. The first windows are left out if they belong to the warm-up. Some are far slower than the others: these
have the compilation in them. Others are before a jump, which the test of steadiness of all runs finds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mnist_dist.errors import UserError
from mnist_dist.study.plan.grid import RATE_AT, RATE_OF, Cell
from mnist_dist.study.plan.table import SAMPLES, UNIT
from mnist_dist.text import cut

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")  # colours, and titles of terminals
NUMBER = re.compile(r"(\d+|\d{1,3}(?:[,_'\u2009\u00a0\u202f ]\d{3})+)(\.\d*)?([eE][+-]?\d{1,2})?\s?([kKMG]?)", re.ASCII)
THOUSANDS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
# A first window belongs to the warm-up if it takes FAR_SLOWER times the median of the later ones, of which there are at
# least LEAST_REST, and more than this quantile of them.
FAR_SLOWER, SLOWEST, LEAST_REST = 1.5, 0.9, 3


@dataclass(frozen=True)
class Printed:
    """How to read the rate that a program prints.

    `pattern` is a regular expression whose group is the number. `at`: all matches count, or the last one. `of`: the
    rate is that of all processes, or of each. It counts `unit`s, and a sample has `units_per_sample` of them.
    """

    pattern: str
    at: str = RATE_AT[0]
    of: str = RATE_OF[0]
    unit: str = SAMPLES
    units_per_sample: float = 1.0

    def __str__(self) -> str:
        return f"{self.pattern!r} (at {self.at}, of {self.of}, {self.unit}={self.units_per_sample:g})"

    def as_row(self) -> dict[str, Any]:
        """As `study.json` holds it; `printed_of` reads it."""
        return asdict(self)


def printed_of(values: Mapping[str, Any] | None) -> Printed | None:
    """What `study.json` holds. Raises `ValueError`, `TypeError` or `KeyError` if it is damaged."""
    if values is None:
        return None
    pattern_of(values["pattern"])
    return Printed(**values)


def pattern_of(text: str) -> re.Pattern[str]:
    """The compiled pattern. Raises `ValueError` if it is none, or has not one group."""
    try:
        pattern = re.compile(text, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"a regular expression with one group around the number ({error})") from None
    if pattern.groups != 1:
        raise ValueError(r"a regular expression with one group around the number, as 'tok/sec: ([\d,.]+)'")
    return pattern


def read_unit(text: str) -> tuple[str, float]:
    """`tokens=2048` as ("tokens", 2048.0), `images` as ("images", 1.0). Raises `ValueError`."""
    match = re.fullmatch(rf"({UNIT})(?:=(\d{{1,12}}(?:\.\d{{1,9}})?))?", text, re.ASCII)
    if match is None or (match[2] and not float(match[2])):
        raise ValueError("a unit, as images, or one with how many of it a sample has, as tokens=2048")
    return match[1], float(match[2] or 1)


def number_of(text: str) -> float:
    """`505,323`, `1 234.5`, `4_512`, `12.3k` or `1.2e4` as a number. Raises `ValueError`."""
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{cut(text)!r} is no number: 1234.5, 1,234.5 and 1.2k are")
    whole, fraction, exponent, factor = match.groups()
    digits = re.sub(r"\D", "", whole, flags=re.ASCII)
    return float(f"{digits}{fraction or ''}{exponent or ''}") * THOUSANDS[factor]


def rates_in(text: str, pattern: str) -> list[float]:
    """The rates above 0 that the text has, in their order. Raises `UserError`."""
    plain = ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n")  # a progress bar ends its line with \r
    try:
        rates = [number_of(match[1] or "") for match in pattern_of(pattern).finditer(plain)]
    except ValueError as error:
        raise UserError(f"--rate-from {cut(pattern)!r}: {error}") from None
    rates = [rate for rate in rates if rate > 0]
    if not rates:
        raise UserError(f"--rate-from {cut(pattern)!r} matches no rate in what the run printed: see output.txt")
    return rates


def warmup_of(seconds: Sequence[float]) -> int:
    """How many of the first windows belong to the warm-up."""
    import numpy as np  # the command line needs no numpy and no scipy

    from mnist_dist.study.analysis.steadiness import steadiness

    first = 0
    while len(rest := seconds[first + 1:]) >= LEAST_REST and seconds[first] > max(
            FAR_SLOWER * np.median(rest), np.quantile(rest, SLOWEST, method="higher")):
        first += 1
    windows = np.array([[1.0, 1.0, each] for each in seconds[first:]])
    return first + steadiness(windows).warmup_steps


def result_from(text: str, printed: Printed, cell: Cell) -> dict[str, Any]:
    """The `result.json` of a run that has printed this. Raises `UserError` if there is no rate in it."""
    rates = rates_in(text, printed.pattern)
    if printed.at == "end":
        rates = rates[-1:]
    batch = cell.global_batch_size
    work = batch * printed.units_per_sample / (cell.processes if printed.of == "process" else 1)
    seconds = [work / rate for rate in rates]
    warmup = warmup_of(seconds)
    windows = [[1, batch, each] for each in seconds[warmup:]]
    return {
        "status": "completed",
        "environment": {"num_processes": cell.processes},
        "summary": {"global_batch_size": batch, "unit": printed.unit, "units_per_sample": printed.units_per_sample,
                    "printed_rates": len(rates) if printed.at == "all" else None, "warmup_rates": warmup},
        "epochs": [{"measured_samples": batch * len(windows), "measured_seconds": sum(seconds[warmup:]),
                    "windows": windows}],
    }
