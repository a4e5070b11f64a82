"""The report of a study, and the comparison of two, made from their tables alone."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mnist_dist.disk.files import make_folder, replace_synced
from mnist_dist.errors import UserError
from mnist_dist.study.analysis.cells import Analysis, CellMetrics, Comparison, Scaling, compare
from mnist_dist.study.analysis.fitted_models import CheckedModel, forecasts_of, judge
from mnist_dist.study.analysis.intervals import LEAST_CONCLUSIVE, LEAST_REPEATS, LEVEL, Interval
from mnist_dist.study.analysis.measured_network import AllReduceTimes, all_reduce_times_of
from mnist_dist.study.analysis.steadiness import LEAST_CHANGE, SIGNIFICANT
from mnist_dist.study.analysis.targets import targets_of
from mnist_dist.study.plan.goals import Goal
from mnist_dist.study.plan.grid import MOST_PROCESSES, Cell, HoldOut, Options, cell_of
from mnist_dist.study.plan.table import CSV, JSONL, Row, write_csv
from mnist_dist.study.report import charts
from mnist_dist.study.report.charts import Series
from mnist_dist.study.report.labels import (
    as_start,
    at_level,
    cell_head,
    cell_words,
    level_of,
    listed,
    name_of_line,
    say,
    short,
)
from mnist_dist.study.report.page import Code, Heading, Inline, Page, Picture, Strong, Table, Text
from mnist_dist.study.report.samples_to_target import add_learning
from mnist_dist.study.report.step_time_section import add_model
from mnist_dist.study.report.summary import by_rate, by_time, headline, how_sure
from mnist_dist.study.report.time_to_target import Answer, add_answers, answer, time_picture
from mnist_dist.tables import number
from mnist_dist.text import counted

REPORT, PICTURES, FORECASTS = "report", "pictures", "forecasts.csv"
FORECAST_COLUMNS = ("options", "batch_size", "processes", "step_seconds", "low", "high", "trusted")
WINDOWS_WORDS = (f"A run whose step times jump or drift by {100 * LEAST_CHANGE:.0f} % or more is marked (rank tests "
                 f"over windows of consecutive steps, p below {SIGNIFICANT:g}).")

COMPARED = (
    "A factor is the ratio of geometric means over the repeats, with Student's interval. All cells of a study have one "
    "relative spread in common, except a cell whose spread is far above the others'; if the spreads are not equal, "
    f"each cell has its own. The intervals of all factors together hold their truths in {100 * LEVEL:.0f} % of "
    "comparisons, and a cell is called faster or slower if its interval does not hold 1. Throughput is what a run had. "
    "Undisturbed is the rate of the 10th percentile of its step times, which other load on the machine changes least.")


def write_report(folder: Path, rows: Sequence[Row], hold_out: HoldOut = MOST_PROCESSES) -> list[Path]:
    """Write `report.md`, `report.html`, the pictures and `forecasts.csv` of these rows; returns the two reports.

    The cells of `hold_out` are left out of the fit of the model, to check it.
    """
    analysis = Analysis(rows)
    make_folder(folder / PICTURES)
    page = Page(f"Scaling study {folder.resolve().name}")
    fabric = _fabric_of(rows)
    targets, models = targets_of(analysis), judge(analysis.cells, hold_out, fabric)
    answers = {target.goal: answer(target, models) for target in targets}
    _head(page, analysis, answers, models, folder / PICTURES)
    add_answers(page, answers.values(), analysis, models, folder / PICTURES)
    if analysis.cells:
        _throughput(page, analysis, folder / PICTURES, is_first=not any(answers.values()))
        _scaling(page, analysis, folder / PICTURES)
        _step_time(page, analysis, folder / PICTURES)
        _ranks(page, analysis)
    _memory(page, analysis)
    if analysis.cells:
        add_model(page, models, folder / PICTURES, fabric, analysis.unit)
    add_learning(page, targets, folder / PICTURES)
    _problems(page, analysis)
    _method(page, analysis)
    write_csv(folder / FORECASTS, FORECAST_COLUMNS,
              [row for options, judged in models.items() for row in forecasts_of(judged, options)])
    return _write(folder, page, REPORT)


def write_comparison(before: tuple[Path, Sequence[Row]], after: tuple[Path, Sequence[Row]]
                     ) -> tuple[list[Path], Comparison]:
    """Write the comparison of two studies (folder and rows) into the folder of the second; returns its two files, and
    what they hold.
    """
    first, second = Analysis(before[1]), Analysis(after[1])
    comparison, unit = compare(first, second), first.unit
    if second.unit != unit:
        raise UserError(f"{before[0]} counts {unit} and {after[0]} counts {second.unit}: they cannot be compared")
    names = [folder.resolve().name for folder, _ in (before, after)]
    page = Page(f"{names[1]} compared with {names[0]}")
    page.add(_verdict(comparison))
    if comparison.differences:
        page.add(Table(
            [*cell_head(second.cells), f"first, {unit}/s", f"second, {unit}/s", "throughput, second / first", "level",
             "shown", "undisturbed, second / first", "shown"],
            [[*cell_words(difference.cell, second.cells), say(difference.before), say(difference.after),
              say(difference.throughput), level_of(difference.throughput), _shown(difference.throughput),
              say(difference.undisturbed) if difference.undisturbed else "too few windows",
              _shown(difference.undisturbed) if difference.undisturbed else ""]
             for difference in comparison.differences]), COMPARED)
    for name, analysis, other in ((names[0], first, second), (names[1], second, first)):
        only = [cell for cell in analysis.cells if cell not in other.cells]
        if only:
            page.add(Text(("Only in ", Code(name), ": ", Code("; ".join(map(str, only))), ".")))
    for title, analysis in zip(("The first", "The second"), (first, second), strict=True):
        page.add(Heading(2, title))
        _origin(page, analysis)
    stem = "compared-with-" + re.sub(r"[^\w.+-]", "_", names[0], flags=re.ASCII)[:60]
    return _write(after[0], page, stem), comparison


def _write(folder: Path, page: Page, stem: str) -> list[Path]:
    written = []
    for suffix, text in ((".md", page.markdown(PICTURES)), (".html", page.html())):
        path = folder / f"{stem}{suffix}"
        replace_synced(path, text.encode())
        written.append(path)
    return written


def _verdict(comparison: Comparison) -> str:
    """The result of a comparison in words: what differs, and what these repeats can show."""
    count = len(comparison.differences)
    both = f"{counted(count, 'cell is', 'cells are')} in both studies. "
    if not count:
        return both
    if comparison.visible is None:
        return both + f"Nothing is shown: a cell needs {LEAST_CONCLUSIVE} repeats or more in each study."
    usual, most = (f"{100 * change:.2g} %" for change in comparison.visible)
    shown = " and ".join(f"{len(cells)} {word}" for cells, word in ((comparison.slower, "slower"),
                                                                    (comparison.faster, "faster")) if cells)
    repeats = min(difference.throughput.n for difference in comparison.differences)
    can = f"{counted(repeats, 'repeat')} of {counted(count, 'cell')} can show a change of {usual}"
    least = "" if usual == most else f", and of {most} in the least certain cell"
    none = f" No change of more than {most} is shown."
    return f"{both}{f'Shown: {shown}. ' if shown else ''}{can}{least}.{'' if shown else none}"


def _shown(factor: Interval) -> str:
    """What the factor shows: a word, or nothing."""
    if not factor.excludes(1.0):
        return ""
    return f"{100 * abs(factor.value - 1):.1f} % {'faster' if factor.value > 1 else 'slower'}"


# ---------------------------------------------------------------------------------------------------------- sections


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
    page.add(time_picture(reached[-1], models, folder) if reached else _rates_picture(analysis, folder))
    page.add(*(f"{goal.title} is not known: at no batch size all runs reached it."
               for goal, answered in answers.items() if answered is None))
    repeats = sorted({len(figures.repeats) for figures in cells.values()})
    many = counted(repeats[0], "repeat") if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]} repeats"
    places = "; ".join(dict.fromkeys(dict(key).get("device_name", "unknown hardware") for key in analysis.environments))
    processes = ", ".join(map(str, sorted({cell.processes for cell in cells})))
    learning = "other batch sizes, learning rates and targets" if answers else "how well the model learns"
    page.add(Text((
        f"Measured: {counted(len(cells), 'cell')} (a batch size on a number of processes), "
        f"{counted(len(analysis.runs), 'run')} in all, {many} of each cell, on ", Code(places), ". Not measured: "
        f"start-up, compilation, warm-up steps, evaluation and checkpoints; {learning}; any number of processes but "
        f"{processes}; other hardware.")))


def _pays(analysis: Analysis, processes: int) -> list[Inline]:
    """Whether so many processes are faster than the fewest that ran the same global batch size."""
    lines: list[Inline] = []
    compared = {cell: scaling for cell, scaling in analysis.strong.items() if cell.processes == processes}
    for base in sorted({scaling.base.processes for scaling in compared.values()}):
        speed_ups = {cell: scaling.speed_up for cell, scaling in compared.items() if scaling.base.processes == base}
        groups: dict[str, list[Cell]] = {"faster": [], "slower": [], "not shown to differ": []}
        for cell, speed_up in speed_ups.items():
            word = "faster" if speed_up.is_above(1) else "slower" if speed_up.is_below(1) else "not shown to differ"
            groups[word].append(cell)
        parts: list[str] = []
        for word, members in groups.items():
            if members:
                parts += ["; " if parts else "", f"{word} at batch ", listed(members)]
        best = max(speed_ups, key=lambda cell: speed_ups[cell].value)
        lines.append(Text((
            f"{counted(processes, 'process', 'processes')} against {base}, the same global batch: ", *parts,
            f". The largest speed-up is {say(speed_ups[best])}{at_level(speed_ups[best])}, at ", Code(str(best)), ".")))
    return lines


def _lines_of(analysis: Analysis) -> list[tuple[str, list[CellMetrics]]]:
    """The lines of a picture over batch sizes, with their names: one for each number of processes and each value of an
    option.
    """
    groups: dict[Any, list[CellMetrics]] = {}
    for cell, figures in analysis.cells.items():
        groups.setdefault((cell.options, cell.processes), []).append(figures)
    return [(name_of_line(processes, options), members) for (options, processes), members in groups.items()]


def _rates_picture(analysis: Analysis, folder: Path) -> Picture:
    best = max(analysis.cells.values(), key=lambda figures: figures.rate.value)
    series = []
    for name, members in _lines_of(analysis):
        series.append(Series(
            name, [m.cell.global_batch_size for m in members], [m.rate for m in members],
            [list(m.rates) for m in members],
            [f"{m.cell}: {say(m.rate)} {analysis.unit}/s, {counted(m.rate.n, 'repeat')}" for m in members]))
    return charts.draw(
        folder, "throughput", f"{as_start(best.cell)} has the highest throughput",
        f"{analysis.unit.capitalize()} per second against the global batch size: median, interval, and each repeat as "
        "a point. Both axes are logarithmic.", series, x_label="global batch size (samples)",
        y_label=f"{analysis.unit}/s", say=f"{{:,.0f}} {analysis.unit}/s".format)


def _throughput(page: Page, analysis: Analysis, folder: Path, is_first: bool) -> None:
    """The rates of the cells, with their picture if it is not at the head of the page, and what processes gain."""
    page.add(Heading(2, "Throughput"))
    if not is_first:
        page.add(_rates_picture(analysis, folder))
    cells = analysis.cells
    best = max(cells.values(), key=lambda figures: figures.rate.value)
    highest = f", {say(best.rate)} {analysis.unit}/s{at_level(best.rate)}."
    page.add([Text(("Highest throughput: ", Code(str(best.cell)), highest)),
              *(line for count in sorted({cell.processes for cell in cells}) for line in _pays(analysis, count))])
    has_flop = any(f.tflops_per_process for f in cells.values())
    page.add(Table(
        [*cell_head(cells), "batch per process", f"{analysis.unit}/s", "ms per step",
         *(["TFLOP/s per process"] if has_flop else []), "repeats", "level", "more repeats needed"],
        [[*cell_words(cell, cells), number(f.per_device_batch_size), say(f.rate), say(f.step_ms),
          *([number(f.tflops_per_process) if f.tflops_per_process else "-"] if has_flop else []), f"{f.rate.n}",
          level_of(f.rate), f"{f.more_repeats or '-'}"] for cell, f in cells.items()],
    ))
    page.add("Medians, with the interval between two order statistics; level: the probability that it holds the "
             f"median. More repeats are needed if half the interval is more than {100 * analysis.precision:g} % of the "
             f"median (for 95 % at least 6), or if there are fewer than {LEAST_REPEATS}.")


def _scaling(page: Page, analysis: Analysis, folder: Path) -> None:
    """Strong and weak scaling: each only if there are cells for it."""
    for title, file, scalings, same, batch_of in (
        ("Strong scaling", "strong", analysis.strong, "the same global batch", lambda c: c.global_batch_size),
        ("Weak scaling", "weak", analysis.weak, "the same batch per process",
         lambda c: c.global_batch_size / c.processes),
    ):
        page.add(Heading(2, title))
        if not scalings:
            page.add(f"Not measured: no cell has {same} on fewer processes.")
            continue
        series = []
        groups: dict[Any, dict[Cell, Scaling]] = {}
        for cell, scaling in scalings.items():
            groups.setdefault((cell.options, batch_of(cell)), {})[cell] = scaling
        for (options, batch), scalings_of_line in groups.items():
            base = next(iter(scalings_of_line.values())).base
            per_process = analysis.cells[base].rate.value / base.processes
            points = [(cell, scaling.efficiency, analysis.cells[cell].rates / per_process / cell.processes)
                      for cell, scaling in sorted(scalings_of_line.items(), key=lambda item: item[0].processes)]
            ones = analysis.cells[base].rates / per_process / base.processes
            series.append(Series(
                f"batch {batch:,.0f}{short(options)}",
                [base.processes, *(cell.processes for cell, _, _ in points)],
                [Interval(1.0, 1.0, 1.0, LEVEL, len(ones)), *(efficiency for _, efficiency, _ in points)],
                [list(ones), *(list(values) for _, _, values in points)],
                [f"{base}: the base case",
                 *(f"{cell}: efficiency {say(efficiency)}" for cell, efficiency, _ in points)]))
        page.add(charts.draw(
            folder, f"efficiency-{file}", f"{title}: efficiency {_span(scalings)}",
            f"{title}: efficiency against the number of processes, {same}. The dashed "
            "line is ideal.", series, x_label="processes", y_label="efficiency (1 is ideal)", log_y=False,
            ideal=lambda x: 1.0, say="efficiency {:.3f}".format))
        cells = analysis.cells
        page.add(Table(
            [*cell_head(scalings), f"{analysis.unit}/s", "base case, processes", f"base case, {analysis.unit}/s",
             "speed-up", "efficiency", "level"],
            [[*cell_words(cell, scalings), say(cells[cell].rate), f"{scaling.base.processes}",
              say(cells[scaling.base].rate), say(scaling.speed_up), say(scaling.efficiency), level_of(scaling.speed_up)]
             for cell, scaling in scalings.items()],
        ))
    page.add("Speed-up: the rate over that of the base case (geometric means), which is the fewest processes. "
             "Efficiency: speed-up, divided by how many times as many processes. Intervals: Student's, with the spread "
             "that the cells have in common; all of a table together hold their truths with the level.")


def _span(scalings: Mapping[Cell, Scaling]) -> str:
    """The least and the largest efficiency in percent."""
    values = [100 * scaling.efficiency.value for scaling in scalings.values()]
    return f"{min(values):.0f} to {max(values):.0f} %" if len(values) > 1 else f"{values[0]:.0f} %"


def _step_time(page: Page, analysis: Analysis, folder: Path) -> None:
    page.add(Heading(2, "Step time"))
    steps = [figures.step_ms.value for figures in analysis.cells.values()]
    series = []
    for name, members in _lines_of(analysis):
        series.append(Series(
            name, [m.per_device_batch_size for m in members], [m.step_ms for m in members],
            [list(m.steps_ms) for m in members],
            [f"{m.cell}: {say(m.step_ms)} ms per step" for m in members]))
    page.add(charts.draw(
        folder, "step-time", f"A step takes {number(min(steps))} to {number(max(steps))} ms",
        "Milliseconds of a step against the batch per process. Both axes are logarithmic.", series,
        x_label="batch per process (samples)", y_label="ms per step", say="{:.3g} ms".format))


def _memory(page: Page, analysis: Analysis) -> None:
    """For each number of processes the largest batch size that fits, with its peak memory, and what does not fit."""
    too_large = [cell_of(row) for row in analysis.failed if row.get("out_of_memory")]
    # by batch size: the last cell of a kind is the largest that fits, and from behind the smallest that does not
    largest = {(cell.options, cell.processes): figures for cell, figures in analysis.cells.items()}
    beyond = {(cell.options, cell.processes): cell
              for cell in sorted(too_large, key=lambda cell: cell.place, reverse=True)}
    if not beyond and not any(figures.peak_memory_bytes for figures in largest.values()):
        return
    every = [*analysis.cells, *too_large]
    lines: list[list[Inline]] = []
    for kind in sorted({*largest, *beyond}):
        fits = [f"{beyond[kind].global_batch_size:,}" if kind in beyond else "-"]
        if figures := largest.get(kind):
            peak = figures.peak_memory_bytes
            batch, *words = cell_words(figures.cell, every)
            fits = [number(figures.per_device_batch_size), number(peak / 2**20) if peak else "-", *fits]
        else:
            batch, words, fits = "none", cell_words(beyond[kind], every)[1:], ["-", "-", *fits]
        lines.append([batch, *words, *fits])
    page.add(Heading(2, "Memory"),
             Table(["largest batch size that fits", *cell_head(every)[1:], "batch per process", "peak memory, MiB",
                    "smallest that does not fit"], lines),
             "Of the batch sizes that were run. Peak memory: of the process that used most, in any run, on its GPU if "
             "it has one. A cell that is out of memory is run once.")


def _ranks(page: Page, analysis: Analysis) -> None:
    """Step time, data wait and memory over ranks: the median over runs of what each run says."""
    lines: list[list[Inline]] = []
    for cell, figures in analysis.cells.items():
        ranks = figures.ranks
        if not ranks or cell.processes == 1:
            continue

        def over(name: str, scale: float = 1.0, ranks: list[Any] = ranks) -> str:
            if not all(rank.get(name) for rank in ranks):
                return "-"
            return " / ".join(number(statistics.median(rank[name][which] for rank in ranks) * scale)
                              for which in ("min", "median", "max"))

        exchange = figures.exchange_ms
        hosts = {str(rank["slowest_host"]) for rank in ranks}
        lines.append([*cell_words(cell, analysis.cells), over("own_ms"),
                      "-" if exchange is None else number(exchange), over("data_wait_ms"),
                      over("peak_memory_bytes", 1 / 2**20), Code(", ".join(sorted(hosts)[:3]))])
    if lines:
        page.add(Heading(2, "Ranks"),
                 Table([*cell_head(analysis.cells), "own ms per step", "exchange, ms per step",
                        "data wait, ms per step", "peak memory, MiB", "host of the slowest rank"], lines),
                 "Minimum / median / maximum over ranks, in the last epoch, median over repeats. Own time is a step "
                 "without the exchange of gradients: the rank with the most of it is the one that the others wait for. "
                 "The exchange is the rest of the step, waiting for that rank included. If ranks differ little, the "
                 "slowest is chance.")


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
    _origin(page, analysis)
    page.add(Text((
        "Every run is a launch of its own, one at a time. Each repeat does every cell once, in random order. The order "
        "is the column ", Code("order"), " of ", Code(CSV), "; ", Code(JSONL), " has every figure, and this report is "
        "made from it alone.")))


def _fabric_of(rows: Sequence[Row]) -> AllReduceTimes | None:
    """What the doctor has measured before the runs, the last time if there were several."""
    fabrics = (all_reduce_times_of(row["study"].get("fabric")) for row in reversed(rows)
               if isinstance(row.get("study"), Mapping))
    return next(filter(None, fabrics), None)


def _origin(page: Page, analysis: Analysis) -> None:
    """Hardware, versions, commands, dates and seeds of a study."""
    items: list[Inline] = []
    for key, count in analysis.environments.items():
        items.append(Text((f"{counted(count, 'run')}: ", Code(", ".join(f"{name} {value}" for name, value in key)))))
    studies = {(row["study"]["date"], row["study"]["command"], row["study"]["seed"]): None
               for row in analysis.rows if isinstance(row.get("study"), Mapping)}
    for date, command, seed in studies:
        items.append(Text((Code(str(date)), ": ", Code(str(command)), " (order: seed ", Code(str(seed)), ")")))
    if fabric := _fabric_of(analysis.rows):
        items.append(Text(("fabric: ", Code(fabric.name), f", {fabric.processes} processes on "
                           f"{counted(fabric.machines, 'machine')}; an all-reduce of {fabric.points[0][0]} bytes takes "
                           f"{number(1e6 * fabric.points[0][1])} µs, one of the gradient's {fabric.gradient_bytes:,} "
                           f"bytes {number(1e6 * fabric.seconds(fabric.gradient_bytes))} µs (mnist-dist doctor)")))
    datasets = {str((row.get("dataset") or {}).get("name")) for row in analysis.rows if row.get("dataset")}
    if datasets:
        items.append(Text(("data: ", Code(", ".join(sorted(datasets))))))
    page.add(items or "Nothing is known of it.")
