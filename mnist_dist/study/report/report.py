"""The report of a study, made from its table alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mnist_dist.disk.files import make_folder
from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.fitted_models import CheckedModel, forecasts_of, judge
from mnist_dist.study.analysis.steadiness import LEAST_CHANGE, SIGNIFICANT
from mnist_dist.study.analysis.targets import targets_of
from mnist_dist.study.plan.goals import Goal
from mnist_dist.study.plan.grid import MOST_PROCESSES, HoldOut, Options
from mnist_dist.study.plan.table import CSV, JSONL, Row, write_csv
from mnist_dist.study.report.origin import add_origin, measured_network_of
from mnist_dist.study.report.page import PICTURES, REPORT, Code, Heading, Page, Strong, Table, Text
from mnist_dist.study.report.samples_to_target import add_learning
from mnist_dist.study.report.step_time_section import add_model
from mnist_dist.study.report.summary import by_rate, by_time, headline, how_sure
from mnist_dist.study.report.throughput import (
    add_memory,
    add_ranks,
    add_scaling,
    add_step_time,
    add_throughput,
    rates_picture,
)
from mnist_dist.study.report.time_to_target import Answer, add_answers, answer, time_picture
from mnist_dist.tables import number
from mnist_dist.text import counted

FORECASTS = "forecasts.csv"
FORECAST_COLUMNS = ("options", "batch_size", "processes", "step_seconds", "low", "high", "trusted")
WINDOWS_WORDS = (f"A run whose step times jump or drift by {100 * LEAST_CHANGE:.0f} % or more is marked (rank tests "
                 f"over windows of consecutive steps, p below {SIGNIFICANT:g}).")


def write_report(folder: Path, rows: Sequence[Row], hold_out: HoldOut = MOST_PROCESSES) -> list[Path]:
    """Write `report.md`, `report.html`, the pictures and `forecasts.csv` of these rows; returns the two reports.

    The cells of `hold_out` are left out of the fit of the model, to check it.
    """
    analysis = Analysis(rows)
    make_folder(folder / PICTURES)
    page = Page(f"Scaling study {folder.resolve().name}")
    fabric = measured_network_of(rows)
    targets, models = targets_of(analysis), judge(analysis.cells, hold_out, fabric)
    answers = {target.goal: answer(target, models) for target in targets}
    _head(page, analysis, answers, models, folder / PICTURES)
    add_answers(page, answers.values(), analysis, models, folder / PICTURES)
    if analysis.cells:
        add_throughput(page, analysis, folder / PICTURES, is_first=not any(answers.values()))
        add_scaling(page, analysis, folder / PICTURES)
        add_step_time(page, analysis, folder / PICTURES)
        add_ranks(page, analysis)
    add_memory(page, analysis)
    if analysis.cells:
        add_model(page, models, folder / PICTURES, fabric, analysis.unit)
    add_learning(page, targets, folder / PICTURES)
    _problems(page, analysis)
    _method(page, analysis)
    write_csv(folder / FORECASTS, FORECAST_COLUMNS,
              [row for options, judged in models.items() for row in forecasts_of(judged, options)])
    return page.write(folder, REPORT)


def _head(page: Page, analysis: Analysis, answers: Mapping[Goal, Answer | None], models: Mapping[Options, CheckedModel],
          folder: Path) -> None:
    """The answer with the picture that decides, how sure it is, and what was measured."""
    cells = analysis.cells
    if not cells:
        page.add("Nothing was measured: no run was completed.")
        return
    reached = [answered for answered in answers.values() if answered]
    contest = by_time(reached[-1]) if reached else by_rate(analysis)
    page.add(headline(contest, analysis))
    if notes := how_sure(analysis, list(models.values())):
        page.add(Text((Strong("How sure:"), f" {'; '.join(map(str, notes))} (below).")))
    page.add(time_picture(reached[-1], models, folder) if reached else rates_picture(analysis, folder))
    page.add(*(f"{goal.title} is not known: at no batch size all runs reached it."
               for goal, answered in answers.items() if answered is None))
    repeats = sorted({len(metrics.repeats) for metrics in cells.values()})
    many = counted(repeats[0], "repeat") if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]} repeats"
    places = "; ".join(dict.fromkeys(dict(key).get("device_name", "unknown hardware") for key in analysis.environments))
    processes = ", ".join(map(str, sorted({cell.processes for cell in cells})))
    learning = "other batch sizes, learning rates and targets" if answers else "how well the model learns"
    page.add(Text((
        f"Measured: {counted(len(cells), 'cell')} (a batch size on a number of processes), "
        f"{counted(len(analysis.runs), 'run')} in all, {many} of each cell, on ", Code(places), ". Not measured: "
        f"start-up, compilation, warm-up steps, evaluation and checkpoints; {learning}; any number of processes but "
        f"{processes}; other hardware.")))


def _problems(page: Page, analysis: Analysis) -> None:
    page.add(Heading(2, "Failed and marked"))
    if analysis.failed:
        page.add(Table(["run or cell", "status", "reason"],
                       [[Code(row["run"]), row["status"], Code(row.get("reason") or "")] for row in analysis.failed]))
    if analysis.marks:
        page.add(Table(["run", "marked because"], [[Code(row["run"]), Code(words)] for row, words in analysis.marks]))
    if not analysis.failed and not analysis.marks:
        page.add("No run failed, and none is marked.")
    page.add(WINDOWS_WORDS)
    if base := analysis.base_runs:
        page.add(Text(("Check of drift: the base case ", Code(base[0].row["run"].rsplit("-", 2)[0]), " was also run "
                       f"first and last: {', '.join(number(run.rate) for run in base)} {analysis.unit}/s.")))
    if analysis.drift:
        change = analysis.drift.change.scaled(100)
        page.add(f"From the first run of the study to the last the rates changed by {change.value:+.1f} % "
                 f"({change.low:+.1f} to {change.high:+.1f} %), by a line through each rate over its cell's median"
                 + ("." if analysis.drift.is_one else ": no drift is shown."))


def _method(page: Page, analysis: Analysis) -> None:
    page.add(Heading(2, "How it was measured"))
    add_origin(page, analysis)
    page.add(Text((
        "Every run is a new launch, and one runs at a time. Each repeat runs every cell once, in random order. The "
        "order is the column ", Code("order"), " of ", Code(CSV), "; ", Code(JSONL), " has every metric, and this "
        "report is made from it alone.")))
