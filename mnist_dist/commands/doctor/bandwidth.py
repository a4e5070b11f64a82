"""How fast the ranks of a launch exchange tensors: latency and bandwidth of the all-reduce, and of each pair of hosts.

Bandwidths are defined as by nccl-tests (doc/PERFORMANCE.md there): the algorithm bandwidth is the bytes of one rank's
tensor over the time. The bus bandwidth is that times 2 (P - 1) / P for P ranks: what a ring needs of every link.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mnist_dist.processes.team import Team

SIZES = tuple(4 * 4**n for n in range(13))  # bytes: 4 B to 64 MiB
SECONDS_PER_SIZE = 0.4
MOST_TIMES, FEWEST_TIMES = 200, 3
LONGEST_SECONDS = 8.0  # for one size: at 10 Mbit/s, sizes on both sides of our gradient's 0.8 MB are measured
SMALL_BYTES, LARGE_BYTES = 65_536, 16_777_216  # of one exchange between two hosts
PAIR_SECONDS = 0.2  # that one exchange should take


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce of `bytes` per rank: the median time of the slowest rank, and the bandwidths."""

    bytes: int
    seconds: float
    algorithm_bandwidth: float  # bytes per second
    bus_bandwidth: float


def all_reduces(team: Team, sizes: Sequence[int] = SIZES) -> list[AllReduce]:
    """An all-reduce of each size, except sizes that would take long over a slow network. Collective."""
    reduced = []
    for size in sizes:
        tensor = torch.zeros(size // 4, device=team.device)
        seconds = _median_seconds(team, functools.partial(team.sum, tensor))
        algorithm = size / seconds
        reduced.append(AllReduce(size, seconds, algorithm, algorithm * 2 * (team.size - 1) / team.size))
        if 4 * seconds * (2 + FEWEST_TIMES) > LONGEST_SECONDS:  # of the next size: every rank has the same time
            break
    return reduced


def _median_seconds(team: Team, exchange: Callable[[], object]) -> float:
    """The median time of an exchange, of the slowest rank. Collective."""
    def once() -> float:
        begin = time.perf_counter()
        exchange()
        team.wait_for_device()
        return time.perf_counter() - begin

    team.barrier()
    (first,) = team.max(min(once(), once()))
    times = max(FEWEST_TIMES, min(MOST_TIMES, int(SECONDS_PER_SIZE / first)))
    (median,) = team.max(statistics.median(once() for _ in range(times)))
    return median


def rounds(number: int) -> Iterator[list[tuple[int, int]]]:
    """All pairs of `number` hosts, in rounds of pairs that share no host (the circle method)."""
    places: list[int | None] = [*range(number), *([None] if number % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        places = [places[0], places[-1], *places[1:-1]]


def pair_bandwidths(team: Team) -> dict[tuple[str, str], float]:
    """Bytes per second between each pair of hosts, there and back; on every rank. Collective."""
    hosts = list(dict.fromkeys(team.hosts))
    firsts = [team.hosts.index(host) for host in hosts]  # the rank that measures for its host
    host_number = firsts.index(team.rank) if team.rank in firsts else None
    bandwidths: dict[tuple[str, str], float] = {}
    for pairs in rounds(len(hosts)):
        team.barrier()
        for a, b in pairs:
            if host_number in (a, b):
                bandwidths[hosts[a], hosts[b]] = _bandwidth(team, firsts[b if host_number == a else a])
    together: dict[tuple[str, str], float] = {}
    for part in team.share(bandwidths):
        for pair, bandwidth in part.items():
            together[pair] = min(bandwidth, together.get(pair, bandwidth))
    return together


def _bandwidth(team: Team, partner: int) -> float:
    def seconds(size: int) -> float:
        """Of one exchange; both ranks take the longer one."""
        tensor = torch.zeros(size // 4, device=team.device)
        begin = time.perf_counter()
        team.swap(tensor, partner)
        team.wait_for_device()
        elapsed = torch.tensor([time.perf_counter() - begin], dtype=torch.float64, device=team.device)
        return max(elapsed.item(), team.swap(elapsed, partner).item())

    seconds(SMALL_BYTES)
    size = int(min(LARGE_BYTES, SMALL_BYTES * max(1.0, PAIR_SECONDS / seconds(SMALL_BYTES)))) // 4 * 4
    return 2 * size / statistics.median(seconds(size) for _ in range(3))
