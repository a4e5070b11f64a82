"""A study in Weights & Biases: its runs are in one group, and one more run there holds the table and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mnist_dist.config import TrainConfig
from mnist_dist.disk.files import names_in
from mnist_dist.record.wandb_run import Mirror
from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.plan.grid import cell_of
from mnist_dist.study.plan.table import CSV, JSONL, Row, rate_of, step_ms_of
from mnist_dist.study.report.labels import name_of_line
from mnist_dist.study.report.page import PICTURES, REPORT
from mnist_dist.study.report.report import FORECASTS

COLUMNS = ("run", "batch size", "processes", "options", "rate", "ms per step", "status", "reason")


def mirror_study(folder: Path, rows: Sequence[Row], config: TrainConfig, study_id: str, command: str,
                 warn: Callable[[str], None]) -> str | None:
    """Send the study's table, throughput, pictures and report, as `config` says; returns the command that brings an
    offline run to the server, or None. It stops nothing, and each call of W&B has a time limit.
    """
    mirror = Mirror(folder, warn)
    mirror.start(config, study_id, {"command": command}, job_type="study")
    mirror.send(lambda run: _log(run, folder, rows))
    mirror.finish()
    return mirror.sync_hint()


def _log(run: Any, folder: Path, rows: Sequence[Row]) -> None:
    import wandb

    analysis = Analysis(rows)
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for cell, metrics in analysis.cells.items():
        sizes, rates = lines.setdefault(name_of_line(cell.processes, cell.options), ([], []))
        sizes.append(cell.global_batch_size)
        rates.append(metrics.rate.value)
    columns: list[str | int] = [analysis.unit + "/s" if name == "rate" else name for name in COLUMNS]
    values: dict[str, Any] = {"runs": wandb.Table(columns=columns, data=[_line(row) for row in rows])}
    if lines:
        values["throughput"] = wandb.plot.line_series(
            xs=[sizes for sizes, _ in lines.values()], ys=[rates for _, rates in lines.values()], keys=list(lines),
            title=f"{analysis.unit}/s per batch size (medians)", xname="global batch size")
    pictures = [folder / PICTURES / name for name in sorted(names_in(folder / PICTURES)) if name.endswith(".png")]
    values |= {f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures}
    run.log(values)
    run.summary.update({
        "cells": len(analysis.cells), "completed_runs": len(analysis.runs),
        "failed_runs": sum(row["status"] == "failed" for row in rows),
        "highest_samples_per_second": max((metrics.rate.value for metrics in analysis.cells.values()), default=None),
    })
    artifact = wandb.Artifact(f"study-{run.id}", type="study")
    for name in (f"{REPORT}.md", f"{REPORT}.html", JSONL, CSV, FORECASTS):
        artifact.add_file(str(folder / name))
    for name in names_in(folder / PICTURES):
        if not (folder / PICTURES / name).is_symlink():  # the files that it names are not sent
            artifact.add_file(str(folder / PICTURES / name), name=f"{PICTURES}/{name}")
    run.log_artifact(artifact)


def _line(row: Row) -> list[Any]:
    cell, rate = cell_of(row), rate_of(row)
    return [row["run"], cell.global_batch_size, cell.processes, ", ".join(f"{k} {v}" for k, v in cell.options), rate,
            rate and step_ms_of(row, rate), row["status"], row.get("reason") or ""]
