"""What a training measures of its steps and its ranks, in the form of `result.json`. Pure arithmetic, without torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any


def in_windows(samples: Sequence[int], seconds: Sequence[float], at_most: int = 40) -> list[list[float]]:
    """Consecutive steps together: [steps, samples, seconds] of at most so many windows with nearly equal numbers of
    steps. What is measured over time, short enough to be kept.
    """
    count = min(at_most, len(seconds))
    edges = [len(seconds) * i // count for i in range(count + 1)] if count else []
    return [[end - begin, sum(samples[begin:end]), round(sum(seconds[begin:end]), 7)] for begin, end in pairwise(edges)]


def over_ranks(of_rank: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Minimum, median and maximum over ranks of each figure, and the slowest rank with its host.

    A step takes the same time on all ranks, because they wait for the slowest: it is the one that takes longest without
    the exchange of gradients (`own_ms`), whether it computes slowly or waits for data.
    """
    slowest = max(range(len(of_rank)), key=lambda rank: of_rank[rank]["own_ms"])
    figures: dict[str, Any] = {"count": len(of_rank)}
    for name in of_rank[0]:
        if name != "host":
            values = sorted(own[name] for own in of_rank)
            figures[name] = {"min": values[0], "median": statistics.median(values), "max": values[-1]}
    return {**figures, "slowest_rank": slowest, "slowest_host": of_rank[slowest]["host"]}
