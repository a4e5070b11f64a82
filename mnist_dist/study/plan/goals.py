"""The goal of a run: a metric, its value, and whether it falls or rises to it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DIRECTIONS = ("lower", "higher")  # whether a metric falls to its target or rises to it


@dataclass(frozen=True)
class Goal:
    """A `value` of a `metric`; `key` is the metric's name in the evaluations of a run."""

    metric: str
    value: float
    is_higher: bool = False
    key: str = "test_nll"

    @property
    def place(self) -> tuple[str, float]:
        """The order of goals: the easiest of a metric first."""
        return self.metric, self.value if self.is_higher else -self.value

    @property
    def file(self) -> str:
        """The goal as a part of a file's name."""
        name = "" if self.metric == NLL else re.sub(r"[^A-Za-z0-9]", "_", self.metric) + "-"
        return f"{name}{self.value:g}"

    @property
    def title(self) -> str:
        """The goal as the start of a sentence, or a heading."""
        return f"Test {self}" if self.metric == NLL else f"{self.metric[0].upper()}{self.metric[1:]} {self.value:g}"

    def is_reached(self, value: float) -> bool:
        """Whether an evaluation with this value has reached it."""
        return value >= self.value if self.is_higher else value <= self.value

    def part(self, before: float, after: float) -> float:
        """Where between two evaluations the metric passes the value, from 0 to 1: by the logarithm of a loss, and of
        the error rate of an accuracy; else on a straight line.
        """
        values = before, self.value, after
        if self.is_higher and min(values) >= 0 and max(values) < 1:
            values = 1 - before, 1 - self.value, 1 - after
        elif self.is_higher or min(values) <= 0:
            return (before - self.value) / (before - after)
        first, goal, last = map(math.log, values)
        return (first - goal) / (first - last)

    def __str__(self) -> str:
        return f"{self.metric} {self.value:g}"


NLL = "NLL"


def goal_of(target: Mapping[str, Any]) -> Goal:
    """The goal of an entry of `summary.targets`."""
    if target.get("target_nll") is not None:
        return Goal(NLL, float(target["target_nll"]))
    return Goal(target["name"], float(target["value"]), target["direction"] == "higher", target["name"])


def is_goal(target: Mapping[str, Any]) -> bool:
    """Whether an entry of `summary.targets` names a goal: a `target_nll`, or `name`, `value` and `direction`."""
    if target.get("target_nll") is not None:
        return is_number(target["target_nll"])
    name = target.get("name")
    return (isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w ./-]{0,29}", name, re.ASCII) is not None
            and is_number(target.get("value")) and target.get("direction") in DIRECTIONS)


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
