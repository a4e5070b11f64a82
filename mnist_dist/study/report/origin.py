"""The origin of a study: hardware, versions, commands, and the network that the doctor measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.measured_network import AllReduceTimes, all_reduce_times_of
from mnist_dist.study.plan.table import Row
from mnist_dist.study.report.page import Code, Inline, Page, Text
from mnist_dist.tables import number
from mnist_dist.text import counted


def add_origin(page: Page, analysis: Analysis) -> None:
    """Hardware, versions, commands, dates and seeds of a study."""
    items: list[Inline] = []
    for key, count in analysis.environments.items():
        items.append(Text((f"{counted(count, 'run')}: ", Code(", ".join(f"{name} {value}" for name, value in key)))))
    studies = {(row["study"]["date"], row["study"]["command"], row["study"]["seed"]): None
               for row in analysis.rows if isinstance(row.get("study"), Mapping)}
    for date, command, seed in studies:
        items.append(Text((Code(str(date)), ": ", Code(str(command)), " (order: seed ", Code(str(seed)), ")")))
    if fabric := measured_network_of(analysis.rows):
        items.append(Text(("fabric: ", Code(fabric.name), f", {fabric.processes} processes on "
                           f"{counted(fabric.machines, 'machine')}; an all-reduce of {fabric.points[0][0]} bytes takes "
                           f"{number(1e6 * fabric.points[0][1])} µs, one of the gradient's {fabric.gradient_bytes:,} "
                           f"bytes {number(1e6 * fabric.seconds(fabric.gradient_bytes))} µs (mnist-dist doctor)")))
    datasets = {str((row.get("dataset") or {}).get("name")) for row in analysis.rows if row.get("dataset")}
    if datasets:
        items.append(Text(("data: ", Code(", ".join(sorted(datasets))))))
    page.add(items or "Nothing is known of it.")


def measured_network_of(rows: Sequence[Row]) -> AllReduceTimes | None:
    """What the doctor measured before the runs, the last time."""
    fabrics = (all_reduce_times_of(row["study"].get("fabric")) for row in reversed(rows)
               if isinstance(row.get("study"), Mapping))
    return next(filter(None, fabrics), None)
