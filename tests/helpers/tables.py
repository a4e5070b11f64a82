"""Tables of made-up studies, for tests of what is said about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mnist_dist.study.plan.grid import Cell


def row(cell: Cell, rate: float, number: int, *, windows: Sequence[Sequence[float]] = (), order: int | None = None,
        **others: Any) -> dict[str, Any]:
    """A completed repeat of the cell at `rate` samples/s, whose windows are scaled to that."""
    samples = sum(window[1] for window in windows) or 100 * cell.global_batch_size
    seconds = samples / rate
    slower = seconds / sum(window[2] for window in windows) if windows else 1.0  # so that they add up
    epoch = {"measured_samples": samples, "measured_seconds": seconds,
             "windows": [[window[0], window[1], window[2] * slower] for window in windows]}
    return {
        "run": f"{cell.name}-repeat-{number}", "role": "repeat", "repeat": number, "order": order or number,
        "global_batch_size": cell.global_batch_size, "processes": cell.processes, "options": dict(cell.options),
        "status": "completed", "reason": "", "started": None, "seconds": 3.0,
        "study": {"command": "mnist-dist study", "seed": 0, "date": "2026-11-25", "script": None},
        "environment": {"num_processes": cell.processes, "device_name": "abacus"},
        "summary": {"global_batch_size": cell.global_batch_size}, "epochs": [epoch], **others,
    }


def windows_of(milliseconds: Sequence[float], batch: int = 10) -> list[list[float]]:
    """Windows of 5 steps that take so long each."""
    return [[5, 5 * batch, 5 * one / 1000] for one in milliseconds]


def study(rates: dict[Cell, float], repeats: int, spread: float, seed: int, **others: Any) -> list[dict[str, Any]]:
    """Repeats of each cell about its rate, with this standard deviation as a part of it."""
    random = np.random.default_rng(seed)
    rows = [row(cell, rate * float(np.exp(spread * random.standard_normal())), number, **others)
            for number in range(1, repeats + 1) for cell, rate in rates.items()]
    return [{**one, "order": order} for order, one in enumerate(rows, 1)]
