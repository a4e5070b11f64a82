"""The first lines of a report: the cell to use, what is as good, what more processes do, and how sure that is."""

from __future__ import annotations

import pytest
from tables import row, study
from test_time_to_target import ideal, ring, rows_of

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.fitted_models import judge
from mnist_dist.study.analysis.targets import targets_of
from mnist_dist.study.plan.grid import MOST_PROCESSES, Cell
from mnist_dist.study.report.summary import by_rate, by_time, headline, how_sure
from mnist_dist.study.report.time_to_target import answer


def words(rows):
    """The first sentences, as text."""
    analysis = Analysis(rows)
    reached = [one for one in (answer(target, {}) for target in targets_of(analysis)) if one]
    return "".join(headline(by_time(reached[-1]) if reached else by_rate(analysis), analysis))


def test_the_soonest_cell_and_what_fewer_processes_take():
    text = words(rows_of(ring))
    assert text.startswith("Use batch 3,200 on 8 processes: 0.219 (0.214 to 0.223, 94 %) s of training to NLL 0.3. ")
    assert "15 other cells are slower. 1 process takes 2.2" in text
    assert text.endswith("times as long (batch 200, the best there). More than 8 processes were not run.")


def test_what_is_as_good_is_named():
    rates = {Cell(50, 1): 500.0, Cell(200, 1): 1000.0, Cell(400, 1): 1003.0, Cell(400, 2): 1001.0, Cell(50, 2): 200.0}
    text = words(study(rates, 5, 0.02, seed=1))
    (used,) = (cell for cell in rates if text.startswith(f"Use {cell}: "))
    equal = {Cell(200, 1), Cell(400, 1), Cell(400, 2)} - {used}
    assert used.global_batch_size > 50 and "Not shown to be slower: batch " in text
    named = text.split("Not shown to be slower: ")[1].split(". ")[0]
    for cell in equal:
        assert f"{cell.global_batch_size}" in named and f"on {cell.processes} process" in named
    assert "50 on" not in named and "batch 50," not in named


def test_more_processes_that_are_slower_say_what_the_exchange_takes():
    rows = rows_of(lambda b, p: ideal(b, p) + 9 * (p > 1), processes=(1, 2),
                   ranks=lambda b, p: (ideal(b, p), ideal(b, p), 0.1))
    text = words(rows)
    assert text.startswith("Use batch 200 on 1 process: 0.510 (")
    assert "2 processes make it 1." in text and "times slower (batch " in text
    assert text.endswith("of 26.0 ms.") and ": the exchange takes 9.0" in text


@pytest.mark.parametrize("repeats, more", [(1, "1 repeat cannot show"), (2, "2 repeats cannot show")])
def test_few_repeats_show_nothing(repeats, more):
    rates = {Cell(50, 1): 10.0, Cell(50, 2): 1000.0}
    text = words(study(rates, repeats, 0.001, seed=1))
    assert f"{more} that another cell is slower; 3 can." in text
    text = words(study({Cell(50, 1): 1000.0, Cell(50, 2): 10.0}, repeats, 0.001, seed=1))
    assert "times slower" not in text and "2 processes " in text


def test_a_base_cell_that_failed_is_named_by_no_one():
    """Batch 400 was never run on one process: its speed-up has another base."""
    rates = {Cell(200, 1): 1000.0, Cell(200, 2): 1900.0, Cell(200, 4): 3600.0, Cell(400, 2): 2100.0,
             Cell(400, 4): 4100.0}
    analysis = Analysis(study(rates, 5, 0.01, seed=1))
    assert {(cell, scaling.base) for cell, scaling in analysis.strong.items()} == {
        (Cell(200, 2), Cell(200, 1)), (Cell(200, 4), Cell(200, 1)), (Cell(400, 4), Cell(400, 2))}
    assert "batch 400 on 1" not in words(study(rates, 5, 0.01, seed=1))


def test_a_single_cell_has_no_rival():
    text = words([row(Cell(50, 1), 10.0, 1)])
    assert text == "Use batch 50 on 1 process: 10.0 (one run) samples/s, the highest throughput. "


def test_how_sure_it_is():
    rates = {Cell(batch, count): batch / ring(batch, count) for batch in (50, 200, 800, 3200) for count in (1, 2, 4, 8)}
    rows = study(rates, 5, 0.01, seed=1)
    rows[0] = {**rows[0], "status": "failed", "reason": "it ended"}
    rows[1]["epochs"][0]["measured_seconds"] *= 7
    analysis = Analysis(rows)
    notes = how_sure(analysis, list(judge(analysis.cells, MOST_PROCESSES).values()))
    assert notes[:2] == ["1 run failed", "1 of 79 runs is marked"]
    assert "need more repeats to be known to 5 %" in notes[2]
    assert "the model of the step time is " in notes[-1] and "if it is fitted without that" in notes[-1]
