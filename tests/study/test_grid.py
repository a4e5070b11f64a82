"""The grid: cells that two scalings share run once, repeats are interleaved, and what cannot run has a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mnist_dist.errors import UserError
from mnist_dist.study.plan.grid import Cell, Grid, PlannedRun, base_of, plan, possible


def test_weak_scaling_multiplies_the_batch_and_shares_cells():
    strong = Grid(batch_sizes=(50, 200), processes=(1, 2)).cells()
    assert [(cell.global_batch_size, cell.processes) for cell in strong] == [(50, 1), (50, 2), (200, 1), (200, 2)]
    both = Grid(batch_sizes=(50, 100), processes=(1, 2), scaling=("strong", "weak")).cells()
    assert [(cell.global_batch_size, cell.processes) for cell in both] == [
        (50, 1), (50, 2), (100, 1), (100, 2), (200, 2)], "50 per process on 2 is 100 on 2"


def test_further_axes_are_crossed():
    cells = Grid(batch_sizes=(8,), axes={"lr": ("0.1", "0.2"), "compile": ("on", "off")}).cells()
    assert [dict(cell.options) for cell in cells] == [
        {"lr": lr, "compile": how} for lr in ("0.1", "0.2") for how in ("on", "off")]
    assert cells[0].name == "b8-p1-lr-0.1-compile-on"
    assert str(cells[0]) == "batch 8 on 1 process, lr 0.1, compile on"


def test_a_name_is_a_file_name_whatever_the_value():
    awkward = ["../../x", "<script>", "a" * 200, "a" * 201, "", "ü", "a b", "a/b"]
    names = [Cell(8, 1, (("lr", value),)).name for value in awkward]
    assert len(set(names)) == len(names)
    for name in names:
        assert name.isascii() and len(name) < 80 and not set(name) & set("/\\<> ")


def test_the_order_is_random_within_a_repeat_and_the_same_for_a_seed():
    cells = Grid(batch_sizes=tuple(range(1, 9)), processes=(1, 2)).cells()
    grid = Grid(batch_sizes=(), repeats=3)
    runs = plan(cells, grid, seed=1, number=1)
    assert runs == plan(cells, grid, seed=1, number=1) != plan(cells, grid, seed=2, number=1)
    assert runs[0] == PlannedRun(Cell(1, 1), "first", 1) and runs[-1] == PlannedRun(Cell(1, 1), "last", 1)
    blocks = [runs[1 + 16 * i : 17 + 16 * i] for i in range(3)]
    for repeat, block in enumerate(blocks, 1):
        assert {run.number for run in block} == {repeat} and {run.cell for run in block} == set(cells)
    assert [run.cell for run in blocks[0]] != [run.cell for run in blocks[1]]
    assert plan(cells, replace(grid, drift=False), seed=1, number=1) == runs[1:-1]


def test_what_is_planned_already_is_not_planned_again():
    cells = Grid(batch_sizes=(1, 2)).cells()
    grid = Grid(batch_sizes=(1, 2), repeats=2)
    first = plan(cells, grid, seed=0, number=1)
    names = [run.name for run in first]
    assert plan(cells, grid, seed=0, number=2, done=names) == []
    wider = Grid(batch_sizes=(1, 2, 3), repeats=3)
    more = plan(wider.cells(), wider, seed=0, number=2, done=names)
    assert {run.name for run in more} == {"b1-p1-first-2", "b1-p1-last-2", "b3-p1-repeat-1", "b3-p1-repeat-2",
                                          "b1-p1-repeat-3", "b2-p1-repeat-3", "b3-p1-repeat-3"}


def test_the_base_case_has_the_fewest_processes():
    assert base_of(Grid(batch_sizes=(50, 200), processes=(4, 2)).cells()) == Cell(50, 2)


@pytest.mark.parametrize("devices, kind, oversubscribe, count", [(2, "cores", False, 3), (2, "cores", True, 4),
                                                               (2, "GPUs", True, 3), (4, "GPUs", False, 4)])
def test_what_cannot_run_has_a_reason(devices, kind, oversubscribe, count):
    def check(cell):
        if cell.global_batch_size == 5:
            raise UserError("five")

    cells = [Cell(1, 1), Cell(2, 2), Cell(9, 2), Cell(9, 4), Cell(3, 4), Cell(5, 1)]
    can, cannot = possible(cells, devices, kind, oversubscribe, check)
    assert len(can) == count and set(can) | set(cannot) == set(cells)
    assert cannot[Cell(5, 1)] == "five" and "smaller than 4 processes" in cannot[Cell(3, 4)]
    if count == 3:
        assert f"has 2 {kind}" in cannot[Cell(9, 4)]
