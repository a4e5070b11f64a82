"""The summary over ranks, and the meter of another training. Needs no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mnist_dist.disk.files import make_folder, real, replace_synced
from mnist_dist.record.environment import processor_name
from mnist_dist.record.result import result_text
from mnist_dist.record.run_folder import RESULT
from mnist_dist.stopwatch import Stopwatch, in_windows


def over_ranks(of_rank: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Minimum, median and maximum over ranks of each metric, and the slowest rank with its host.

    A step takes the same time on all ranks, because they wait for the slowest: it is the one that takes longest without
    the exchange of gradients (`own_ms`), whether it computes slowly or waits for data.
    """
    slowest = max(range(len(of_rank)), key=lambda rank: of_rank[rank]["own_ms"])
    metrics: dict[str, Any] = {"count": len(of_rank)}
    for name in of_rank[0]:
        if name != "host":
            values = sorted(values_of_rank[name] for values_of_rank in of_rank)
            metrics[name] = {"min": values[0], "median": statistics.median(values), "max": values[-1]}
    return {**metrics, "slowest_rank": slowest, "slowest_host": of_rank[slowest]["host"]}


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
        self._watch, self._open = Stopwatch(self.synchronize, self.clock), ExitStack()
        self._open_window()
        return self

    def _open_window(self) -> None:
        self._window = self._open.enter_context(self._watch.window(warmup=self._warmup_left > 0))

    def step(self, samples: int) -> None:
        """An optimizer step is done, over `samples` samples of all processes."""
        self._window.lap([samples], 0.0)
        if self._warmup_left:
            self._warmup_left -= 1
            if not self._warmup_left:
                self._open.close()
                self._open_window()

    def __exit__(self, *error: object) -> None:
        self._open.close()
        watch = self._watch
        self.epochs.append({
            "measured_samples": watch.samples,
            "measured_seconds": watch.seconds if watch.samples else 0.0,
            "windows": in_windows(watch.step_samples, watch.step_seconds),
        })

    def write(self, folder: str | Path, *, global_batch_size: int, num_processes: int, **environment: Any) -> None:
        """Write `result.json` into the folder, which is made if it is missing; for one process to call.

        `environment` is what the study's table shows of hardware and versions, such as torch="2.6".
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
