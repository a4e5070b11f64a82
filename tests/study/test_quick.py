"""`mnist-dist study --quick`: its choice of the grid, its end in time, and that a killed one goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from support import ROOT, run_here
from tables import row

from mnist_dist.errors import MnistDistError
from mnist_dist.study.plan.grid import Cell, HoldOut
from mnist_dist.study.plan.quick import LADDER, LARGE, SECONDS, SMALL, Looks, batch_sizes, choose, duration, first_look
from mnist_dist.study.plan.table import read_table
from mnist_dist.study.run import program as program_module
from mnist_dist.study.run import study
from mnist_dist.study.run.launches import Machine

STAND_IN = ROOT / "tests" / "helpers" / "stand_in.py"


def looks(devices, seconds=10.0, fixed=1e-3, per_sample=7e-6):
    """The rows of a first look at a machine: of `seconds`, half are steps."""
    rows = []
    for cell in first_look(devices).cells():
        made = row(cell, cell.global_batch_size / (fixed + per_sample * cell.global_batch_size), 1)
        (epoch,) = made["epochs"]
        rows.append({**made, "seconds": seconds, "epochs": [{**epoch, "train_seconds": seconds / 2}]})
    return rows


@pytest.mark.parametrize("fixed, per_sample, largest", [
    (1e-3, 7e-6, 12_800),  # two cores: computing outweighs the rest from a batch of 143 on
    (3e-4, 1e-7, 51_200),  # a GPU: from 3,000 on
    (0.0, 1e-6, 12_800), (1e-3, 0.0, 51_200),
])
def test_the_step_times_decide_the_batch_sizes(fixed, per_sample, largest):
    sizes = batch_sizes(fixed + SMALL * per_sample, fixed + LARGE * per_sample)
    assert sizes[-1] == largest and len(sizes) == 5 and set(sizes) <= set(LADDER) and 200 in sizes


@pytest.mark.parametrize("devices, seconds, processes, repeats, sizes", [
    (1, 6.0, (1,), 5, 5), (1, 25.0, (1,), 3, 5), (1, 60.0, (1,), 3, 2), (2, 8.0, (1, 2), 5, 5), (2, 20.0, (1, 2), 3, 4),
    (2, 26.0, (1, 2), 3, 3), (2, 36.0, (1, 2), 3, 2), (2, 44.0, (1, 2), 3, 2), (6, 5.0, (1, 2, 4, 6), 4, 5),
    (8, 16.0, (1, 8), 4, 4), (8, 3.0, (1, 2, 4, 8), 5, 5),
])
def test_the_duration_of_runs_decides_the_grid(devices, seconds, processes, repeats, sizes):
    rows = looks(devices, seconds)
    grid, hold_out = choose(rows, devices)
    assert (grid.processes, grid.repeats, len(grid.batch_sizes)) == (processes, repeats, sizes)
    assert {SMALL, LARGE} <= set(grid.batch_sizes), "the runs of the first look are part of it"
    assert duration(grid, Looks(rows, devices)) <= SECONDS or seconds > 44
    held = {} if len(processes) > 2 or sizes < 4 else {"global_batch_size": grid.batch_sizes[sizes // 2]}
    assert hold_out == HoldOut(held)


def test_however_slow_the_machine_every_cell_has_three_repeats():
    for devices in (1, 2, 3, 8):
        for seconds in range(1, 300, 7):
            grid, _ = choose(looks(devices, float(seconds)), devices)
            assert grid.repeats >= 3 and {1, devices} <= set(grid.processes)


def test_what_a_run_takes_follows_from_the_first_look():
    rows = looks(4)
    told = Looks(rows, 4)
    for cell, made in zip(first_look(4).cells(), rows, strict=True):
        assert told.seconds(cell) == pytest.approx(made["seconds"]), "a cell of the first look takes what it took"
    between = [told.seconds(Cell(size, 2)) for size in (200, 800, 3200, 12_800)]
    assert all(9 < seconds < 30 for seconds in between)
    grid = first_look(4)
    assert duration(grid, told) == pytest.approx(4 * 10)
    assert duration(replace(grid, drift=True, repeats=3), told) == pytest.approx(3 * 40 + 2 * 10)


def test_a_failed_first_look_is_named():
    rows = looks(2)
    rows[1] |= {"status": "failed", "reason": "no memory"}
    with pytest.raises(MnistDistError, match="the first look failed: batch 200 on 2 processes: no memory"):
        choose(rows, 2)
    with pytest.raises(MnistDistError, match="the first look failed: batch 200 on 2 processes: it was not run"):
        choose([rows[0], *rows[2:]], 2)


FINDINGS = [  # of a doctor
    {"name": "cores", "problem": "of 2 cores only 1.0 do work at once", "remedy": "end what else runs here"},
    {"name": "processes", "value": [
        {"rank": rank, "host": "attic", "device": "cpu (gloo)", "backend": "gloo", "interface": "veth0"}
        for rank in (0, 1)]},
    {"name": "all-reduce", "value": [
        {"bytes": 4, "seconds": 1e-4}, {"bytes": 2**20, "seconds": 1e-3}]},
]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """`study --quick` in `tmp_path` with runs of the stand-in, on a machine with two cores."""
    def command_of(run, folder, options, program, launcher):
        alone = replace(run, cell=replace(run.cell, processes=1))  # a process says that it is several: much sooner
        words = program_module.command_of(alone, folder, [], program_module.Program(script=str(STAND_IN)))
        return [*words, f"--processes={run.cell.processes}", *(["--trouble", trouble[0]] if trouble else [])]

    trouble = []
    monkeypatch.setattr(study, "command_of", command_of)
    monkeypatch.setattr("mnist_dist.commands.study.look_at_machine", lambda use_cpu: Machine(0, 2))
    monkeypatch.setattr(study, "examine", lambda processes, *rest: FINDINGS)

    def run(*words):
        return run_here(["study", "--quick", "--output-dir", str(tmp_path), "--wandb", "disabled", *words])

    run.trouble = trouble
    return run


def last(printed):
    return printed.strip().splitlines()[-1]


def started(folder):
    return (folder / "started.txt").read_text().split()


def test_it_looks_chooses_and_reports(quick, tmp_path, capsys):
    assert quick() == 0
    rows = read_table(tmp_path)
    assert "doctor: of 2 cores only 1.0 do work at once: end what else runs here" in capsys.readouterr().out
    assert {row["study"]["fabric"]["name"] for row in rows} == {"gloo over veth0"}
    assert [row["order"] for row in rows] == list(range(1, len(rows) + 1))
    assert {(row["global_batch_size"], row["processes"]) for row in rows[:4]} == {
        (200, 1), (200, 2), (12_800, 1), (12_800, 2)}
    cells = {(row["global_batch_size"], row["processes"]) for row in rows}
    assert len(cells) == 10 and {200, 800, 3200} <= {batch for batch, _ in cells}
    assert all(row["status"] == "completed" for row in rows)
    assert rows[-1]["study"]["hold_out"] == {"global_batch_size": 800}
    report = (tmp_path / "report.md").read_text()
    assert "The model was fitted without 2 cells" in report
    assert run_here(["report", str(tmp_path)]) == 0 and (tmp_path / "report.md").read_text() == report


@pytest.mark.long
def test_the_same_command_goes_on_where_it_was_stopped(quick, tmp_path, monkeypatch):
    do, count = study._do, []

    def interrupted(*arguments):
        count.append(None)
        if len(count) == 9:
            raise KeyboardInterrupt
        do(*arguments)

    monkeypatch.setattr(study, "_do", interrupted)
    assert quick() == 130
    before = started(tmp_path)
    assert len(before) == 8 and (tmp_path / "report.md").exists()
    stamps = {name: (tmp_path / "runs" / name / "result.json").stat().st_mtime_ns for name in before}
    plan = json.loads((tmp_path / "study.json").read_text())["runs"]
    monkeypatch.setattr(study, "_do", do)
    assert quick() == 0
    assert json.loads((tmp_path / "study.json").read_text())["runs"] == plan, "the same choice"
    assert stamps == {name: (tmp_path / "runs" / name / "result.json").stat().st_mtime_ns for name in before}
    assert started(tmp_path)[:8] == before and len(started(tmp_path)) == len(plan)


@pytest.mark.long
def test_it_ends_in_time(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "SECONDS", 1.5)
    assert quick() == 0
    printed = capsys.readouterr().out
    assert "the 2 s of --quick are over: " in printed and " runs left out" in printed
    rows = read_table(tmp_path)
    assert 4 < len(rows) < 52 and sum(row["seconds"] for row in rows) < 2.5
    assert quick() == 0 and len(read_table(tmp_path)) == len(rows), "no more time with the same command"


def test_a_run_of_the_first_look_that_fails_ends_it(quick, tmp_path, capsys):
    quick.trouble.append("12800:memory")
    assert quick() == 1
    reason = "out of memory: MemoryError: no room for the batch"
    assert f"the first look failed: batch 12,800 on 1 process: {reason}" in last(capsys.readouterr().err)
    assert (tmp_path / "report.md").exists() and len(started(tmp_path)) == 4


@pytest.mark.parametrize("words", [["--batch-sizes", "5"], ["--processes", "2"], ["--repeats", "3"],
                                   ["--scaling", "weak"], ["--axis", "lr=0.1"], ["--script", sys.executable]])
def test_what_it_chooses_cannot_be_given(words, capsys):
    assert run_here(["study", "--quick", *words]) == 2
    assert last(capsys.readouterr().err) == (
        f"mnist-dist: error: --quick chooses the grid by itself, got {words[0]} {words[1]}: drop one of the two")


def test_options_of_training_that_are_given_hold(quick, tmp_path):
    assert quick("--target-nll", "0.5", "--dry-run") == 0
    from mnist_dist.cli import parse
    from mnist_dist.commands.study import request_from

    given = parse(["study", "--quick", "--target-nll", "0.5"])
    request = request_from(given, ["study", "--quick"])
    assert request.fixed["--target-nll"] == "0.5" and request.fixed["--lr-rule"] == "sqrt" and request.quick
    assert "--noise-scale" in request.options and "--compile=off" in request.options
