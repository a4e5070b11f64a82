"""What a training measures of its steps and its ranks, in the form of `result.json`. Needs no torch.

`Meter` is for any training, so that a study can read what it measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mnist_dist.disk.files import make_folder, real, replace_synced
from mnist_dist.record.environment import processor_name
from mnist_dist.record.result import result_text
from mnist_dist.record.run_folder import RESULT


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


class Meter:
    """Measures the training steps of any script and writes the `result.json` that a study reads.

    Each `with meter:` block is an epoch, without its evaluation; `step` is called after each optimizer step in it. The
    first `warmup_steps` steps are left out. `synchronize` waits for the device and the other processes: it is called at
    both ends of what is measured and never within.
    """

    def __init__(self, *, warmup_steps: int = 5, synchronize: Callable[[], Any] = lambda: None,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self.synchronize, self.clock = synchronize, clock
        self.epochs: list[dict[str, Any]] = []
        self._warmup_left = warmup_steps

    def __enter__(self) -> Meter:
        self._samples: list[int] = []
        self._start()
        return self

    def _start(self) -> None:
        self.synchronize()
        self._marks = [self.clock()]

    def step(self, samples: int) -> None:
        """An optimizer step is done, over so many samples of all processes."""
        if self._warmup_left:
            self._warmup_left -= 1
            if not self._warmup_left:
                self._start()
            return
        self._samples.append(samples)
        self._marks.append(self.clock())

    def __exit__(self, kind: object, *rest: object) -> None:
        self.synchronize()
        laps = [after - before for before, after in pairwise(self._marks)]
        self.epochs.append({
            "measured_samples": sum(self._samples),
            "measured_seconds": self.clock() - self._marks[0] if laps else 0.0,
            "windows": in_windows(self._samples, laps),
        })

    def write(self, folder: str | Path, *, global_batch_size: int, num_processes: int, **environment: Any) -> None:
        """Write `result.json` into the folder, which is made if it is missing; for one process to call.

        `environment` is what else the study's table is to say of hardware and versions, such as torch="2.6".
        """
        result = {
            "status": "completed",
            "environment": {"device_name": processor_name(), "num_processes": num_processes, **environment},
            "summary": {"global_batch_size": global_batch_size},
            "epochs": self.epochs,
        }
        target = real(Path(folder))
        make_folder(target)
        replace_synced(target / RESULT, result_text(result).encode())
