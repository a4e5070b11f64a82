"""What a study prints: its plan, a line for each run, and how long the rest takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mnist_dist.study.plan.grid import Cell, PlannedRun, cell_of
from mnist_dist.study.plan.table import Row, rate_of, unit_of, write_table
from mnist_dist.study.run.folder import Study
from mnist_dist.study.run.launches import Machine
from mnist_dist.text import counted

# For an estimate before any run: a start, and what a step and a sample cost on a CPU core pair, in seconds.
START_SECONDS, STEP_SECONDS, SAMPLE_SECONDS, UNKNOWN_SAMPLES = 6.0, 1.5e-3, 5e-6, 60_000
UNTIL_TARGET = 300_000  # samples of a run that ends at its target, roughly


def estimate(pending: Sequence[PlannedRun], rows: Sequence[Row], fixed: Mapping[str, Any],
             predicted: Callable[[Cell], float] | None = None) -> float:
    """Seconds that the pending runs take: as the same cell took, else as all cells did in comparison with what is
    `predicted` or with a rough formula, else by that.
    """
    def rough(cell: Cell) -> float:
        samples = UNKNOWN_SAMPLES * int(fixed.get("--epochs") or 1)
        if fixed.get("--max-steps"):
            samples = min(samples, int(fixed["--max-steps"]) * cell.global_batch_size)
        if fixed.get("--target-nll"):
            samples = min(samples, UNTIL_TARGET)
        return START_SECONDS + samples / cell.global_batch_size * STEP_SECONDS + samples * SAMPLE_SECONDS

    seen: dict[Cell, list[float]] = {}
    for row in rows:
        if row["status"] == "completed" and row["seconds"]:
            seen.setdefault(cell_of(row), []).append(row["seconds"])
    known = {cell: statistics.median(seconds) for cell, seconds in seen.items()}
    expected = predicted or rough
    factor = statistics.median(seconds / expected(cell) for cell, seconds in known.items()) if known else 1.0
    return sum(known.get(run.cell, factor * expected(run.cell)) for run in pending)


def say_duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_plan(study: Study, machine: Machine, say: Callable[[str], None]) -> list[PlannedRun]:
    """Print what will be run, and what cannot be; returns the runs that are pending."""
    rows = study.rows()
    done = {row["run"] for row in rows if row["status"] == "completed"}
    pending = [run for run in study.runs if run.name not in done and run.cell not in study.impossible]
    cells = sorted({run.cell for run in study.runs}, key=lambda cell: cell.place)
    say(f"{counted(len(cells), 'cell')}, {counted(len(study.runs), 'run')} on {machine}, of which "
        f"{len(done)} are done; the others take about "
        f"{say_duration(estimate(pending, rows, study.fixed, study.predicted))}")
    for cell in cells:
        runs_of_cell = [run for run in study.runs if run.cell == cell]
        drift = sum(run.role != "repeat" for run in runs_of_cell)
        more = f", and {drift} more as a check of drift" if drift else ""
        say(f"  {cell}: {counted(len(runs_of_cell) - drift, 'repeat')}{more}")
    for cell, reason in study.impossible.items():
        say(f"  cannot run: {cell}: {reason}")
    return pending


def add_row(study: Study, run: PlannedRun, say: Callable[[str], None], place: str, left: Sequence[PlannedRun] = ()
            ) -> None:
    """The run is over: write the table with it, and a line."""
    rows = study.rows()
    write_table(study.folder, rows)
    row = next(row for row in rows if row["run"] == run.name)
    if row["status"] == "completed":
        rate = rate_of(row)
        what = "nothing measured" if rate is None else f"{rate:,.0f} {unit_of(row)}/s"
    else:
        what = f"failed: {row['reason']}"
    took = "" if row["seconds"] is None else f", {row['seconds']:.1f} s"
    rest = f"; about {say_duration(estimate(left, rows, study.fixed, study.predicted))} left" if left else ""
    say(f"{place} {run.name}: {what}{took}{rest}")
