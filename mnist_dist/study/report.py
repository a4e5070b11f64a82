"""The report of a study, made from its table alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from mnist_dist.record.files import replace_synced
from mnist_dist.study.table import Row
from mnist_dist.tables import number, table

REPORT = "report.md"


def write_report(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the report of these rows; returns the files."""
    cells: dict[tuple, list[float]] = {}
    for row in rows:
        if row["status"] == "completed" and row["role"] == "repeat":
            seconds = sum(epoch["measured_seconds"] for epoch in row["epochs"])
            if seconds:
                key = (row["global_batch_size"], row["processes"], *row["options"].items())
                cells.setdefault(key, []).append(sum(epoch["measured_samples"] for epoch in row["epochs"]) / seconds)
    lines = ["# Scaling study", ""]
    lines += table(["batch size", "processes", "samples/s (median)", "repeats"],
                   [[f"{size:,}", f"{processes}", number(statistics.median(rates)), f"{len(rates)}"]
                    for (size, processes, *_), rates in cells.items()])
    problems = [row for row in rows if row["status"] != "completed"]
    if problems:
        lines += ["## Not measured", ""]
        lines += table(["run", "status", "reason"], [[row["run"], row["status"], row["reason"]] for row in problems])
    path = folder / REPORT
    replace_synced(path, ("\n".join(lines)).encode())
    return [path]
