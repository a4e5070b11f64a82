"""The parts of a report on throughput: rates, speed-up, step times, memory, and differences between ranks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.cells import CellMetrics, Scaling
from mnist_dist.study.analysis.intervals import LEAST_REPEATS, LEVEL, Interval
from mnist_dist.study.plan.grid import Cell, cell_of
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
from mnist_dist.study.report.page import Code, Heading, Inline, Page, Picture, Table, Text
from mnist_dist.tables import number
from mnist_dist.text import counted


def lines_of(analysis: Analysis) -> list[tuple[str, list[CellMetrics]]]:
    """The lines of a picture over batch sizes, with their names: one for each number of processes and each value of an
    option.
    """
    groups: dict[Any, list[CellMetrics]] = {}
    for cell, metrics in analysis.cells.items():
        groups.setdefault((cell.options, cell.processes), []).append(metrics)
    return [(name_of_line(processes, options), members) for (options, processes), members in groups.items()]


def rates_picture(analysis: Analysis, folder: Path) -> Picture:
    """Throughput against the global batch size, a line for each of `lines_of`."""
    best = max(analysis.cells.values(), key=lambda metrics: metrics.rate.value)
    series = []
    for name, members in lines_of(analysis):
        series.append(Series(
            name, [m.cell.global_batch_size for m in members], [m.rate for m in members],
            [list(m.rates) for m in members],
            [f"{m.cell}: {say(m.rate)} {analysis.unit}/s, {counted(m.rate.n, 'repeat')}" for m in members]))
    return charts.draw(
        folder, "throughput", f"{as_start(best.cell)} has the highest throughput",
        f"{analysis.unit.capitalize()} per second against the global batch size: median, interval, and each repeat as "
        "a point. Both axes are logarithmic.", series, x_label="global batch size (samples)",
        y_label=f"{analysis.unit}/s", say=f"{{:,.0f}} {analysis.unit}/s".format)


def add_throughput(page: Page, analysis: Analysis, folder: Path, is_first: bool) -> None:
    """The rates of the cells, with their picture if it is not at the head of the page, and what processes gain."""
    page.add(Heading(2, "Throughput"))
    if not is_first:
        page.add(rates_picture(analysis, folder))
    cells = analysis.cells
    best = max(cells.values(), key=lambda metrics: metrics.rate.value)
    highest = f", {say(best.rate)} {analysis.unit}/s{at_level(best.rate)}."
    page.add([Text(("Highest throughput: ", Code(str(best.cell)), highest)),
              *(line for count in sorted({cell.processes for cell in cells})
                for line in lines_on_batches(analysis, count))])
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


def add_scaling(page: Page, analysis: Analysis, folder: Path) -> None:
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


def add_step_time(page: Page, analysis: Analysis, folder: Path) -> None:
    """Milliseconds of a step on a whole global batch, with their picture."""
    page.add(Heading(2, "Step time"))
    steps = [metrics.step_ms.value for metrics in analysis.cells.values()]
    series = []
    for name, members in lines_of(analysis):
        series.append(Series(
            name, [m.per_device_batch_size for m in members], [m.step_ms for m in members],
            [list(m.steps_ms) for m in members],
            [f"{m.cell}: {say(m.step_ms)} ms per step" for m in members]))
    page.add(charts.draw(
        folder, "step-time", f"A step takes {number(min(steps))} to {number(max(steps))} ms",
        "Milliseconds of a step against the batch per process. Both axes are logarithmic.", series,
        x_label="batch per process (samples)", y_label="ms per step", say="{:.3g} ms".format))


def add_memory(page: Page, analysis: Analysis) -> None:
    """For each number of processes the largest batch size that fits, with its peak memory, and what does not fit."""
    too_large = [cell_of(row) for row in analysis.failed if row.get("out_of_memory")]
    # by batch size: the last cell of a kind is the largest that fits, and from behind the smallest that does not
    largest = {(cell.options, cell.processes): metrics for cell, metrics in analysis.cells.items()}
    beyond = {(cell.options, cell.processes): cell
              for cell in sorted(too_large, key=lambda cell: cell.place, reverse=True)}
    if not beyond and not any(metrics.peak_memory_bytes for metrics in largest.values()):
        return
    every = [*analysis.cells, *too_large]
    lines: list[list[Inline]] = []
    for kind in sorted({*largest, *beyond}):
        fits = [f"{beyond[kind].global_batch_size:,}" if kind in beyond else "-"]
        if metrics := largest.get(kind):
            peak = metrics.peak_memory_bytes
            batch, *words = cell_words(metrics.cell, every)
            fits = [number(metrics.per_device_batch_size), number(peak / 2**20) if peak else "-", *fits]
        else:
            batch, words, fits = "none", cell_words(beyond[kind], every)[1:], ["-", "-", *fits]
        lines.append([batch, *words, *fits])
    page.add(Heading(2, "Memory"),
             Table(["largest batch size that fits", *cell_head(every)[1:], "batch per process", "peak memory, MiB",
                    "smallest that does not fit"], lines),
             "Of the batch sizes that were run. Peak memory: of the process that used most, in any run, on its GPU if "
             "it has one. A cell that is out of memory is run once.")


def add_ranks(page: Page, analysis: Analysis) -> None:
    """Step time, data wait and memory over ranks: the median over runs of what each run says."""
    lines: list[list[Inline]] = []
    for cell, metrics in analysis.cells.items():
        ranks = metrics.ranks
        if not ranks or cell.processes == 1:
            continue

        def over(name: str, scale: float = 1.0, ranks: list[Any] = ranks) -> str:
            if not all(rank.get(name) for rank in ranks):
                return "-"
            return " / ".join(number(statistics.median(rank[name][which] for rank in ranks) * scale)
                              for which in ("min", "median", "max"))

        exchange = metrics.exchange_ms
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


def lines_on_batches(analysis: Analysis, processes: int) -> list[Inline]:
    """Whether `processes` processes are faster than the fewest that ran the same global batch size."""
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
