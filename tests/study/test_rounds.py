"""Repeats that adapt: how many runs they save, how often the intervals hold the truth, and a study that does it."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import count

import numpy as np
import pytest
from made_up import NOISES, repeats
from support import run_here

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.intervals import median_interval
from mnist_dist.study.plan.grid import FIRST_REPEATS, Cell, PlannedRun
from mnist_dist.study.plan.table import read_table
from mnist_dist.study.run.rounds import expected_runs, is_known, next_round

SPREADS = (0.005, 0.01, 0.02, 0.05)  # of the rates of a cell; a study has as many cells of each
PRECISION, ENOUGH = 0.03, 150


def until_narrow_once(rates, precision):
    """The rule without its correction: stop at the first interval that is narrow."""
    return len(rates) >= FIRST_REPEATS and median_interval(rates).half_width <= precision


def stopped(noise, spread, rule, random):
    """The rates of a cell that is repeated until the rule says that it is known."""
    rates = repeats(noise, spread, ENOUGH, random)
    return next((rates[:n] for n in range(FIRST_REPEATS, ENOUGH) if rule(rates[:n], PRECISION)), rates)


def fixed_repeats(noise, share, random, tables):
    """The repeats of every cell with which this share of the cells of the largest spread are known to the precision."""
    return next(n for n in count(FIRST_REPEATS) if np.mean(
        [median_interval(repeats(noise, SPREADS[-1], n, random)).half_width <= PRECISION
         for _ in range(tables)]) >= share)


def adaptive(noise, rule, tables):
    """Per spread: (mean number of repeats, how often the interval holds the truth)."""
    random = np.random.default_rng(7)
    metrics = []
    for spread in SPREADS:
        cells = [stopped(noise, spread, rule, random) for _ in range(tables)]
        intervals = [median_interval(rates) for rates in cells]
        metrics.append((np.mean([len(rates) for rates in cells]),
                        np.mean([interval.low <= 1 <= interval.high for interval in intervals])))
    return np.array(metrics)


@pytest.mark.long
@pytest.mark.parametrize("noise", NOISES)
def test_fewer_launches_and_intervals_that_hold_the_truth(noise):
    random = np.random.default_rng(5)
    most, half = (fixed_repeats(noise, share, random, 400) for share in (0.95, 0.5))
    for name, rule in (("as it is", is_known), ("without the correction", until_narrow_once)):
        metrics = adaptive(noise, rule, 1_000)
        launches, coverage = metrics.mean(0)
        each = ", ".join(f"{100 * held:.1f}" for held in metrics[:, 1])
        fewer = " and ".join(f"{100 * (1 - launches / fixed):.0f} % fewer than {fixed}" for fixed in (half, most))
        print(f"{noise}, {name}: {launches:.1f} repeats, {fewer}; the intervals hold the truth in "
              f"{100 * coverage:.1f} %, by spread {each} %")
        if rule is is_known:
            assert launches <= 0.7 * half
            assert 0.93 <= coverage <= 0.975, "6 repeats hold it in 96.9 %"
            assert metrics[:, 1].min() >= 0.93, "no kind of cell pays for the others"


def row(run, rate):
    epochs = [{"measured_samples": 1000, "measured_seconds": 1000 / rate}] if rate else []
    return {"run": run.name, "role": run.role, "status": "completed" if rate else "failed", **run.cell.as_row(),
            "summary": {}, "epochs": epochs}


def test_a_round_has_the_cells_that_are_not_known():
    steady, noisy, failing, fresh, once, stopped_early = (Cell(size, 1) for size in (50, 100, 200, 400, 800, 1600))
    rates = {steady: [100.0] * 6, noisy: [100.0, 130.0] * 3, failing: [100.0, 130.0] * 2 + [None, None],
             fresh: [None] * 6, once: [None] + [100.0, 130.0] * 3, stopped_early: [100.0, 130.0] * 3}
    runs = [PlannedRun(cell, "repeat", number) for cell, values in rates.items()
            for number in range(1, 1 + len(values))]
    rows = [row(run, rates[run.cell][run.number - 1]) for run in runs]
    runs.append(PlannedRun(stopped_early, "repeat", 7))  # memory ran out before it: it was not run
    drift = PlannedRun(noisy, "first", 1)
    analysis = Analysis([row(drift, 1e6), *rows])
    new = next_round([drift, *runs], analysis, PRECISION, seed=0)
    assert set(new) == {PlannedRun(noisy, "repeat", 7), PlannedRun(once, "repeat", 8)}
    assert new == next_round([drift, *runs], analysis, PRECISION, seed=0), "the order is the seed's"
    about = Counter(run.cell for run in expected_runs(new, analysis, PRECISION))
    assert about[noisy] == about[once] > 10
    assert next_round(runs, Analysis(rows), precision=0.3, seed=0) == []
    assert not next_round(runs, Analysis([]), PRECISION, seed=0), "a cell without a rate"


def test_a_cell_is_known_when_two_rounds_say_so():
    narrow = [100.0, 101, 102, 103, 104, 105]
    assert is_known(narrow, 0.03) and not is_known(narrow[:5], 0.03)
    wide = [90.0, *narrow[1:], 105.5]
    assert not is_known(wide, 0.03), "all seven are within 8 %"
    assert median_interval([*wide, 103, 102]).half_width <= 0.03
    assert not is_known([*wide, 103, 102], 0.03), "narrow for the first time"
    assert is_known([*wide, 103, 102, 103], 0.03), "and again"


PROGRAM = """
import json, random, sys
batch, folder, seed = int(sys.argv[1]), sys.argv[2], sys.argv[3]
spread = {50: 0.001, 100: 0.15}[batch]
seconds = random.Random(seed + sys.argv[1]).gauss(0, spread) + 1
json.dump({"status": "completed", "environment": {"num_processes": 1}, "summary": {"global_batch_size": batch},
           "epochs": [{"measured_samples": 100, "measured_seconds": seconds}]}, open(folder + "/result.json", "w"))
"""


def test_a_study_repeats_what_it_does_not_know(tmp_path, capsys):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    folder = tmp_path / "s"
    words = ["study", "--command", f"{sys.executable} {program} {{batch_size}} {{output_dir}} {{seed}}", "--precision",
             "8%", "--batch-sizes", "50,100", "--wandb", "disabled", "--output-dir", str(folder)]
    assert run_here(words) == 0
    printed = capsys.readouterr().out
    assert "1 cell is not known to 8 % yet: about " in printed
    rows = read_table(folder)
    counts = Counter(row["global_batch_size"] for row in rows if row["role"] == "repeat")
    assert counts[50] == 6 < counts[100]
    assert [row["role"] for row in rows].index("last") == len(rows) - 1
    rates = [100 / row["epochs"][0]["measured_seconds"] for row in rows
             if row["role"] == "repeat" and row["global_batch_size"] == 100]
    assert is_known(rates, 0.08) and not any(is_known(rates[:n], 0.08) for n in range(6, len(rates)))
    report = (folder / "report.md").read_text()
    assert "more than 8 % of the median" in report and "to be known to" not in report
    words[words.index("8%")] = "7%"
    assert run_here(words) == 0
    finer = read_table(folder)
    assert len(finer) > len(rows) and "more than 7 % of the median" in (folder / "report.md").read_text()


@pytest.mark.parametrize("words, message", [
    (["--precision", "3"], "--precision must be a percentage above 0 and below 100, as in 3%, got '3'"),
    (["--precision", "0%"], "--precision must be a percentage"), (["--precision", "nan%"], "--precision must be a"),
    (["--precision", "3%", "--repeats", "5"], "--precision 3% chooses the repeats, got --repeats 5"),
    (["--budget", "30"], "--budget must be a time above 0 with its unit, as in 90s, 30min or 2h, got '30'"),
    (["--budget", "0s"], "--budget must be a time"), (["--budget", "-1h"], "--budget must be a time"),
    (["--budget", "infh"], "--budget must be a time"), (["--budget", "1 day"], "--budget must be a time"),
    (["--budget", "1h", "--launcher", "slurm"], "--budget 1h is for runs one at a time"),
    (["--quick", "--budget", "1h"], "--quick chooses the grid by itself, got --budget 1h"),
    (["--quick", "--precision", "5%"], "--quick chooses the grid by itself, got --precision 5%"),
])
def test_bad_input_is_one_line(words, message, assert_refused):
    assert_refused(words, message)


def test_a_budget_ends_the_study(tmp_path, capsys):
    program = tmp_path / "train.sh"
    program.write_text("sleep 1\n" + 'echo \'{"status": "completed", "environment": {"num_processes": 1}, "summary": '
                       '{"global_batch_size": 200}, "epochs": [{"measured_samples": 100, "measured_seconds": \'$2"}]}" '
                       '> "$1/result.json"\n')
    folder = tmp_path / "s"
    words = ["study", "--command", f"sh {program} {{output_dir}} 1.{{seed}}", "--precision", "1%", "--budget", "4.5s",
             "--wandb", "disabled", "--output-dir", str(folder)]
    assert run_here(words) == 0
    printed = capsys.readouterr().out
    assert "the 4 s of --budget are over: " in printed and "left out" in printed
    done = len(read_table(folder))
    assert 1 <= done <= 4
    assert run_here(words) == 0 and len(read_table(folder)) == done, "the time of a study counts, not of a command"
    words[words.index("4.5s")] = "8s"
    assert run_here(words) == 0 and done < len(read_table(folder)) <= 7
