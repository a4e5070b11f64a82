"""What a report answers: the soonest cell, the cheapest, the knee, and why more processes do not help."""

from __future__ import annotations

import pytest
from support import run_here
from tables import row

from mnist_dist.study.plan.grid import Cell
from mnist_dist.study.plan.table import write_table

LEAST, CRITICAL = 30_000, 1500
COMMUNICATION, WAIT, STRAGGLER, CORES = "communication", "waiting for data", "waiting for the slowest rank", "computing"


def rows_of(step_ms, batches=(50, 200, 800, 3200), processes=(1, 2, 4, 8), repeats=5, ranks=None, environment=None):
    """Cells that take 30,000 (1 + B / 1500) samples to the target, and `step_ms(batch, processes)` for a step; repeats
    differ by 1 % of it. `ranks(batch, processes)`: (usual own, slowest own, data wait) in ms.
    """
    rows = []
    for batch in batches:
        for count in processes:
            for number in range(1, repeats + 1):
                step = step_ms(batch, count) * (1 + 0.01 * (number - 3))
                one = row(Cell(batch, count), batch / step * 1000, number, config={"seed": number})
                samples = LEAST * (1 + batch / CRITICAL)
                one["summary"]["targets"] = [{"target_nll": 0.3, "step": round(samples / batch), "samples": samples}]
                one["epochs"][0]["step"] = round(samples / batch)
                if ranks:
                    usual, slowest, wait = ranks(batch, count)
                    one["epochs"][0]["ranks"] = {
                        "count": count, "slowest_rank": 0, "slowest_host": "abacus",
                        "step_ms": dict.fromkeys(("min", "median", "max"), step),
                        "own_ms": {"min": usual, "median": usual, "max": slowest},
                        **{name: dict.fromkeys(("min", "median", "max"), wait)
                           for name in ("data_wait_ms", "peak_memory_bytes")}}
                one["environment"] |= environment(count) if environment else {}
                rows.append(one)
    return rows


def report(folder, rows, *words):
    """(the first lines on the target, the section)."""
    write_table(folder, rows)
    assert run_here(["report", str(folder), *words]) == 0
    text = (folder / "report.md").read_text()
    first = next(line for line in text.splitlines() if line.startswith("Soonest with"))
    return first, text.split("## Time to a target\n")[1].split("\n## ")[0]


def ideal(batch, processes):
    return 1 + 0.01 * batch / processes


def ring(batch, processes):
    return ideal(batch, processes) + 2 * (processes - 1) * (0.1 + 0.6 / processes)


def lines(section):
    return {line.split(" | ")[0].strip("| ") + " on " + line.split(" | ")[1]: line.split(" | ")[2:]
            for line in section.splitlines() if line.startswith("| ") and "---" not in line}


def test_the_soonest_the_cheapest_and_the_knee_are_told_apart(tmp_path):
    """Seconds, and device-seconds: batch 200 on 1 process 0.51, 0.51; batch 800, of 58 steps, on 2 0.333, 0.667, on 4
    0.257, 1.03; batch 3,200, of 29.4 steps, on 8 0.219, 1.75.
    """
    first, section = report(tmp_path, rows_of(ring))
    assert "Soonest with `batch 3,200 on 8 processes`, 0.219 (" in first
    assert "Cheapest with `batch 200 on 1 process`, 0.510 (" in first
    assert "The knee is `batch 800 on 2 processes`, 0.3" in first
    assert "1 process takes 2.3" in first and "More than 8 processes were not run." in first
    table = lines(section)
    assert table["3,200 on 8"][-1].strip(" |") == "soonest" and table["3,200 on 8"][-2] == "1"
    assert table["200 on 1"][-1].strip(" |") == "cheapest"
    assert table["800 on 2"][-1].strip(" |") == "knee" and table["800 on 4"][-1].strip(" |") == "front"
    assert sum(cells[-1].strip(" |") == "front" for cells in table.values()) == 1
    assert (tmp_path / "pictures/time-0.3.png").exists()


def test_measured_and_modelled_times_are_side_by_side_and_forecasts_called_so(tmp_path):
    first, section = report(tmp_path, rows_of(ring))
    table = lines(section)
    for cells in table.values():
        if cells[0] not in ("not run", "seconds to it"):
            measured, modelled = (float(cell.split()[0].replace(",", "")) for cell in cells[:2])
            assert modelled == pytest.approx(measured, rel=0.03)
    ahead = {name: cells for name, cells in table.items() if cells[0] == "not run"}
    assert {name.split()[-1] for name in ahead} == {"16", "32", "64"}
    assert all(cells[-1].strip(" |") == "forecast" for cells in ahead.values())
    value = float(ahead["3,200 on 16"][1].split()[0])
    assert value == pytest.approx(29.4 * ring(3200, 16) / 1000, rel=0.03)
    assert "The model's forecast for `batch 3,200 on 16 processes` is 0.2" in first
    assert "which is not shown to be sooner. " in first, "half the bandwidth may be left there"


def test_a_forecast_whose_check_fails_is_not_to_be_trusted(tmp_path):
    first, section = report(tmp_path, rows_of(lambda batch, count: ring(batch, count) * (2 if count == 8 else 1)))
    assert "it is not to be trusted" in first and "forecast, not to be trusted" in section


@pytest.mark.parametrize("name, step, ranks", [
    (COMMUNICATION, lambda b, p: ideal(b, p) + 9 * (p > 1), lambda b, p: (ideal(b, p), ideal(b, p), 0.1)),
    (WAIT, lambda b, p: ideal(b, p) + 9 * (p > 1), lambda b, p: (*[ideal(b, p) + 9 * (p > 1)] * 2, 9 * (p > 1))),
    (STRAGGLER, lambda b, p: ideal(b, p) + 9 * (p > 1), lambda b, p: (ideal(b, p), ideal(b, p) + 9 * (p > 1), 0.1)),
    (CORES, lambda b, p: 12.0, lambda b, p: (12.0, 12.0, 0.1)),
])
def test_more_processes_that_do_not_help_have_a_cause(name, step, ranks, tmp_path):
    rows = rows_of(step, processes=(1, 2), batches=(200, 400, 800), ranks=ranks)
    first, _ = report(tmp_path, rows)
    assert "2 processes do not help: they take" in first or "2 processes are not shown to help: they take" in first
    assert f"The cause is {name}: at batch 800 a step takes" in first
    others = {COMMUNICATION, WAIT, STRAGGLER} - {name}
    assert not any(other in first for other in others)


def test_without_times_of_ranks_the_cause_is_not_known(tmp_path):
    first, _ = report(tmp_path, rows_of(lambda b, p: ideal(b, p) + 9 * (p > 1), processes=(1, 2)))
    assert "The cause is not known: the runs do not say what their ranks wait for." in first


def test_on_a_cpu_a_core_is_a_device(tmp_path):
    """One process on two threads occupies as much as two on one thread each."""
    def environment(count):
        return {"device": "cpu", "num_threads": 2 // count, "num_machines": 1}

    rows = rows_of(lambda b, p: 5.0 + 9 * (p > 1), processes=(1, 2), environment=environment,
                   ranks=lambda b, p: (5.0 + 9 * (p > 1),) * 2 + (0.1,))
    first, section = report(tmp_path, rows)
    seconds, _, cost = (cell.split()[0] for cell in lines(section)["3,200 on 1"][:3])
    assert float(cost) == pytest.approx(2 * float(seconds), rel=0.01)
    assert "It is also the cheapest" in first and "computing (the processes share the same cores)" in first


def test_single_runs_are_not_sure(tmp_path):
    first, _ = report(tmp_path, rows_of(ring, repeats=1))
    assert "How sure this is, is not known: a single run has no spread." in first
    assert "15 of 15 others are not shown to be slower" in first


def test_one_process_alone_says_what_was_not_measured(tmp_path):
    first, _ = report(tmp_path, rows_of(ring, processes=(1,)))
    assert "More than 1 process was not run." in first
    assert "forecast" not in first, "communication was not measured"
