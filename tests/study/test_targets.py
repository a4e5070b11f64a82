"""Where a run reaches a target: between two evaluations."""

from __future__ import annotations

import math

import made_up
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import NOISES
from tables import row, study

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.targets import reached_at, targets_of
from mnist_dist.study.plan.goals import goal_of
from mnist_dist.study.plan.grid import Cell, cell_of
from mnist_dist.study.plan.table import read_table, write_table
from mnist_dist.study.report.report import write_report


def run(*values, batch=10, target=0.3, every=100, key="test_nll", direction="lower"):
    """(row, target) of a run with these NLLs, or other figures, at evaluations each `every` steps."""
    evaluations = [{"step": every * number, "samples": every * number * batch, key: value}
                   for number, value in enumerate(values, 1)]
    goal = {"target_nll": target} if key == "test_nll" else {"name": key, "value": target, "direction": direction}
    there = next((one for one in evaluations if goal_of(goal).is_reached(one[key])), {"step": None, "samples": None})
    return ({"global_batch_size": batch, "epochs": [{"step": every * len(values), "evaluations": evaluations}]},
            {**goal, "step": there["step"], "samples": there["samples"]})


@given(st.floats(0.05, 2), st.floats(2_000, 90_000))
def test_a_power_law_is_within_the_doubt(exponent, samples):
    reached = reached_at(*run(*(0.3 * (1000 * k / samples) ** -exponent for k in range(1, 100))))
    assert abs(math.log(reached.samples / samples)) <= reached.doubt + 1e-9
    assert reached.apart == 1000 and reached.steps == pytest.approx(reached.samples / 10)


@given(st.floats(1e-5, 1e-3), st.floats(2_000, 90_000))
def test_so_is_an_exponential(rate, samples):
    reached = reached_at(*run(*(0.3 * math.exp(rate * (samples - 1000 * k)) for k in range(1, 100))))
    assert abs(math.log(reached.samples / samples)) <= reached.doubt + 1e-9


@given(st.floats(0.05, 2), st.floats(2_000, 90_000))
def test_so_is_an_accuracy_that_rises(exponent, samples):
    values = (1 - 0.1 * (1000 * k / samples) ** -exponent for k in range(1, 100))
    reached = reached_at(*run(*values, target=0.9, key="accuracy", direction="higher"))
    assert abs(math.log(reached.samples / samples)) <= reached.doubt + 1e-9


@pytest.mark.parametrize("values, target, direction, samples", [
    ((10, 20, 30), 25, "higher", 2500), ((0.5, 1.0, 1.5), 1.25, "higher", 2500), ((-1, -2, -3), -2.5, "lower", 2500),
    ((1, 0.5, 0), 0.25, "lower", 2500), ((0.2, 0.9, 1.0), 0.95, "higher", 2500), ((0, 0, 1), 1, "higher", 3000),
])
def test_other_figures_are_on_a_straight_line(values, target, direction, samples):
    reached = reached_at(*run(*values, target=target, key="score", direction=direction))
    assert abs(math.log(reached.samples / samples)) <= reached.doubt + 1e-9


def test_goals_of_several_figures_have_an_order_and_names():
    targets = [{"target_nll": 0.3}, {"target_nll": 0.4}, {"name": "top 5", "value": 0.9, "direction": "higher"},
               {"name": "top 5", "value": 0.8, "direction": "higher"}]
    goals = sorted(map(goal_of, targets), key=lambda goal: goal.place)
    assert list(map(str, goals)) == ["NLL 0.4", "NLL 0.3", "top 5 0.8", "top 5 0.9"]
    assert [goal.file for goal in goals] == ["0.4", "0.3", "top_5-0.8", "top_5-0.9"]
    assert [goal.title for goal in goals[1:3]] == ["Test NLL 0.3", "Top 5 0.8"]


def test_a_study_with_an_accuracy(tmp_path):
    rows = study({Cell(50, 1): 1000.0, Cell(100, 1): 1500.0}, 3, 0.01, 0)
    for one in rows:
        batch, samples = one["global_batch_size"], 3_000 + 20 * one["global_batch_size"]
        there = -(-samples // 1000) * 1000
        one["summary"]["targets"] = [{"name": "accuracy", "value": 0.9, "direction": "higher", "step": there // batch,
                                      "samples": there}]
        one["epochs"][0] |= {"step": 10_000 // batch, "evaluations": [
            {"step": 1000 * k // batch, "samples": 1000 * k, "accuracy": 1 - 0.1 * samples / (1000 * k)}
            for k in range(1, 11)]}
        one["config"] = {"seed": one["repeat"]}
    (target,) = targets_of(Analysis(rows))
    for learnt in target.learnt:
        assert learnt.samples.value == pytest.approx(3_000 + 20 * learnt.batch, rel=0.02)
    write_table(tmp_path, rows)
    write_report(tmp_path, read_table(tmp_path))
    report = (tmp_path / "report.md").read_text()
    assert "to accuracy 0.9" in report and "### Accuracy 0.9" in report and "NLL 0" not in report
    assert (tmp_path / "pictures" / "time-accuracy-0.9.svg").exists()


def test_the_first_evaluation_leaves_much_open_and_none_everything():
    reached = reached_at(*run(0.2, 0.1))
    assert (reached.samples, reached.apart, reached.doubt) == (1000, 1000, 0.5)
    assert math.isinf(reached_at(*run(0.5, 0.4)).samples)
    table, target = run(0.5, 0.2)
    assert reached_at({**table, "epochs": [{"step": 200}]}, target).samples == 2000, "no evaluations in the row"


def test_an_evaluation_at_the_target_is_exact():
    assert reached_at(*run(0.9, 0.3)).samples == pytest.approx(2000)


def normal(spread, size, random):
    return made_up.repeats("normal", spread, size, random)


def with_target(rows, samples):
    for one in rows:
        one["summary"]["targets"] = [{"target_nll": 0.3, "step": samples(one) / one["global_batch_size"],
                                      "samples": samples(one)}]
        one["epochs"][0]["step"] = 1e9
        one["config"] = {"seed": one["repeat"]}
    return rows


@pytest.mark.parametrize("repeats", [3, 5, 10])
@pytest.mark.parametrize("tables", [60, pytest.param(300, marks=pytest.mark.long)])
def test_of_equal_cells_none_is_slower_than_the_soonest(repeats, tables):
    """20 cells that take the same time to the target: at most 5 % of studies call one of them slower."""
    random, wrong = np.random.default_rng(repeats), 0
    cells = {Cell(10 * 2**size, processes): 1000.0 * 2**size for size in range(10) for processes in (1, 2)}
    for seed in range(tables):
        factors = {(cell.global_batch_size, number): math.exp(0.02 * random.standard_normal())
                   for cell in cells for number in range(1, repeats + 1)}

        def samples(one, factors=factors):
            return 100 * one["global_batch_size"] * factors[one["global_batch_size"], one["repeat"]]

        rows = with_target(study(cells, repeats, 0.02, seed), samples)
        (target,) = targets_of(Analysis(rows))
        soonest = min(target.times, key=lambda one: one.typical)
        wrong += any(target.ratio(one, soonest).excludes(1) for one in target.times)
    print(f"\\n{wrong} of {tables} studies of {repeats} repeats call one of 20 equal cells slower than the soonest")
    assert wrong / tables <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / tables)


@pytest.mark.long
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("repeats", [3, 5, 10])
def test_times_hold_the_truth(repeats, noise):
    """500 tables of two cells: the seconds of each, and how many times as long one takes."""
    random = np.random.default_rng(repeats)
    first, second = Cell(50, 1), Cell(100, 1)
    # the seconds of a run are its samples over its rate: their median over all runs, by simulation
    median = np.median(normal(0.03, 10**6, random) / made_up.repeats(noise, 0.02, 10**6, random))
    held, levels = [], []
    for seed in range(500):
        rows = study({first: 1.0, second: 1.0}, repeats, 0.0, seed)
        samples = {first: 20_000 * normal(0.03, repeats, random), second: 30_000 * normal(0.03, repeats, random)}
        for one in with_target(rows, lambda one, samples=samples: samples[cell_of(one)][one["repeat"] - 1]):
            one["epochs"][0]["measured_seconds"] = 1.0
            one["epochs"][0]["measured_samples"] = 1000 * float(made_up.repeats(noise, 0.02, 1, random)[0])
        (target,) = targets_of(Analysis(rows))
        times = {one.cell: one for one in target.times}
        ratio = target.ratio(times[second], times[first])
        held.append([times[first].seconds.low <= 20 * median <= times[first].seconds.high,
                     ratio.low <= 1.5 <= ratio.high])
        levels.append([times[first].seconds.level, ratio.level])
    shares = np.mean(held, axis=0)
    print(f"\n{noise}, {repeats} repeats: the seconds hold the truth in {100 * shares[0]:.1f} %, their ratio in "
          f"{100 * shares[1]:.1f} %")
    level = np.array(levels[0])
    assert (shares >= level - 2.5 * np.sqrt(level * (1 - level) / 500)).all(), "2.5 standard errors of 500 tables"


def test_cells_of_one_batch_differ_by_their_step_alone():
    """Samples to the target differ by 30 % from run to run, and rates by 0.5 %: a step that is 10 % slower is seen."""
    rates = {Cell(50, 1): 1000.0, Cell(50, 2): 900.0, Cell(400, 1): 5000.0}
    rows = with_target(study(rates, 5, 0.005, 1), lambda one: 30_000 * (0.7 + 0.1 * one["repeat"]))
    (target,) = targets_of(Analysis(rows))
    first, second, _ = sorted(target.times, key=lambda one: (one.cell.global_batch_size, one.cell.processes))
    ratio = target.ratio(second, first)
    assert ratio.excludes(1) and ratio.value == pytest.approx(1 / 0.9, rel=0.02)
    assert second.seconds.value == pytest.approx(30, rel=0.15)


def test_a_cell_without_a_target_has_no_time():
    assert targets_of(Analysis([row(Cell(50, 1), 10.0, 1)])) == []
