"""The network of a study's processes: the all-reduce as `mnist-dist doctor` measures it, before the study's runs.

The model of the step time begins its search there, and its latency and bandwidth are compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GRADIENT_NUMBERS = 784 * 256 + 256 + 256 * 10 + 10  # of our model; they are exchanged as one message
FLOATS = {"float32": 4, "float64": 8}  # bytes of one


@dataclass(frozen=True)
class AllReduceTimes:
    """An all-reduce over these processes: `points` are its bytes per process and seconds, the fewest bytes first."""

    processes: int
    machines: int
    name: str
    gradient_bytes: int
    points: Sequence[tuple[int, float]]

    def seconds(self, size: float) -> float:
        """An all-reduce of `size` bytes, on the line between the two nearest sizes or beyond the last two."""
        at = next((at for at, (bytes, _) in enumerate(self.points[1:-1], 1) if size <= bytes), len(self.points) - 1)
        (smaller, sooner), (larger, later) = self.points[at - 1 : at + 1]
        return later + (later - sooner) / (larger - smaller) * (size - larger)

    @property
    def ring(self) -> tuple[float, float]:
        """Seconds of a message, and to send the whole gradient once, if it is a ring (see step_time.py)."""
        n = self.processes
        least = self.points[0][1]
        rest = max(0.0, self.seconds(self.gradient_bytes) - least)
        return least / (2 * (n - 1)), rest / (2 * (n - 1) / n)

    def as_row(self) -> dict[str, Any]:
        """For the table of a study."""
        return {"processes": self.processes, "machines": self.machines, "name": self.name,
                "gradient_bytes": self.gradient_bytes, "all_reduce": [list(point) for point in self.points]}


def all_reduce_times_of(values: Any) -> AllReduceTimes | None:
    """What `as_row` gave; None if it is none, or damaged."""
    try:
        points = sorted((int(size), float(seconds)) for size, seconds in values["all_reduce"])
        fabric = AllReduceTimes(int(values["processes"]), int(values["machines"]), str(values["name"]),
                                int(values["gradient_bytes"]), points)
    except (TypeError, ValueError, KeyError, OverflowError):
        return None
    sizes, times = zip(*points, strict=True) if points else ((), ())
    is_whole = len(set(sizes)) == len(points) >= 2 and all(0 < time < math.inf for time in times)
    return fabric if is_whole and fabric.processes > 1 <= fabric.machines and fabric.gradient_bytes > 0 else None


def from_doctor(findings: Sequence[Mapping[str, Any]], dtype: str) -> AllReduceTimes | None:
    """The times in the findings of `mnist-dist doctor --json`; None if there are none."""
    by_name = {finding.get("name"): finding for finding in findings}
    try:
        ranks, reduced = by_name["processes"]["value"], by_name["all-reduce"]["value"]
        hosts, backends = ({rank[what] for rank in ranks} for what in ("host", "backend"))
        over = f" over {ranks[0]['interface']}" if ranks[0]["interface"] else ""
        return all_reduce_times_of({
            "processes": len(ranks), "machines": len(hosts), "gradient_bytes": GRADIENT_NUMBERS * FLOATS[dtype],
            "name": f"{', '.join(sorted(backends))}{over}",
            "all_reduce": [(point["bytes"], point["seconds"]) for point in reduced]})
    except (KeyError, TypeError, AttributeError, IndexError):
        return None
