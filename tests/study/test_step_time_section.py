"""What a report says of the model of the step time: checked, trusted or not, and what is a forecast."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from support import run_here
from tables import study
from test_report import cells_of

from mnist_dist.study.analysis.step_time import Place, seconds
from mnist_dist.study.plan.grid import Cell
from mnist_dist.study.plan.table import write_table

TITLE = "Model of the step time"
TRUTH = np.array([0.5e-3, 1e-6, 60, 50e-6, 300e-6, 0, 0])


def rates_of(processes, batches=(256, 1024, 4096, 16384), change=lambda place, time: time, threads=lambda count: 1):
    """The truth's rate of each cell; with `threads`, a process has so many of those that one process has."""
    rates = {}
    for count in processes:
        for batch in batches:
            place = Place(math.ceil(batch / count), count, 1, threads(count) / threads(1))
            rates[Cell(batch, count)] = batch / change(place, seconds(TRUTH, [place])[0])
    return rates


def section(folder, rates, *words, spread=0.02, repeats=5, **others):
    write_table(folder, study(rates, repeats, spread, seed=2, **others))
    assert run_here(["report", str(folder), *words]) == 0
    return (folder / "report.md").read_text().split(f"## {TITLE}\n")[1].split("\n## ")[0]


def tables_of(text):
    return cells_of(f"## {TITLE}\n{text}", TITLE)


def test_a_true_model_is_checked_and_forecasts(tmp_path):
    text = section(tmp_path, rates_of((1, 2, 4, 8)))
    assert "fitted without 4 cells" in text and "not to be trusted" not in text
    held = [line for line in tables_of(text) if line[1] == "8"]
    assert [line[0] for line in held] == ["256", "1,024", "4,096", "16,384"]
    assert all(abs(float(line[4].removesuffix(" %"))) < 10 for line in held)
    ahead = [line for line in tables_of(text) if line[1] in ("16", "32", "64")]
    assert [line[1] for line in ahead[:3]] == ["16", "32", "64"]
    for line in ahead:
        batch, count = int(line[0].replace(",", "")), int(line[1])
        time = 1000 * seconds(TRUTH, [Place(math.ceil(batch / count), count)])[0]
        assert float(line[2].split()[0]) == pytest.approx(time, rel=0.1)
        assert sum(int(share.removesuffix(" %")) for share in line[4:]) == pytest.approx(100, abs=1)
    assert "**Forecast**, for more processes than were run" in text
    assert text.rstrip().endswith("Level of the intervals and bands: 95 %.")
    with open(tmp_path / "forecasts.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch_size"], row["processes"]) for row in rows[:3]] == [("256", "16"), ("256", "32"), ("256", "64")]
    for row in rows:
        batch, count = int(row["batch_size"]), int(row["processes"])
        time = seconds(TRUTH, [Place(math.ceil(batch / count), count)])[0]
        assert float(row["low"]) < time < float(row["high"]) and row["trusted"] == "True" and row["options"] == "{}"
    page = (tmp_path / "report.html").read_text()
    assert "<strong>Forecast</strong>" in page


def test_a_wrong_model_is_not_trusted(tmp_path):
    text = section(tmp_path, rates_of((1, 2, 4, 8),
                                      change=lambda place, time: time * (2 if place.processes == 8 else 1)))
    assert "**Not every measured time is within its band: the forecast is not to be trusted.**" in text


def test_two_process_counts_need_another_choice(tmp_path):
    rates = rates_of((1, 2))
    text = section(tmp_path, rates)
    assert "is not checked: the cells that are left out are the only ones with several processes" in text
    assert "**Its forecast is not to be trusted.**" in text and "--hold-out batch-size=N" in text
    text = section(tmp_path, rates, "--hold-out", "processes=2, batch-size=1024")
    assert "fitted without 1 cell" in text and "not to be trusted" not in text
    assert "| 1,024 | 2 | " in text and "one size of ring does not separate latency from sending" in text


def test_processes_that_share_cores_have_fewer_threads(tmp_path):
    """On 8 cores: 8, 4, 2 threads, and no forecast beyond one each."""
    rates = rates_of((1, 2, 4), threads=lambda count: 8 // count)
    rows = study(rates, 5, 0.01, seed=3)
    for one in rows:
        one["environment"] |= {"device": "cpu", "num_threads": 8 // one["processes"]}
    write_table(tmp_path, rows)
    assert run_here(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text().split(f"## {TITLE}\n")[1].split("\n## ")[0]
    assert "not to be trusted" not in text
    ahead = [line for line in tables_of(text) if len(line) == 7 and line[1].isdecimal()]
    assert {line[1] for line in ahead} == {"8"}
    time = 1000 * seconds(TRUTH, [Place(2048, 8, 1, 1 / 8)])[0]
    assert float(ahead[-1][2].split()[0]) == pytest.approx(time, rel=0.1)


def test_without_enough_cells_there_is_a_reason(tmp_path):
    text = section(tmp_path, rates_of((1,), batches=(256,)))
    assert "No model: it needs two or more batches per process." in text and "![" not in text


@pytest.mark.parametrize("what", ["8", "processes=x", "threads=8", "", "processes=8,"])
def test_what_cannot_be_held_out(what, tmp_path, capsys):
    write_table(tmp_path, study(rates_of((1,)), 1, 0.0, seed=1))
    assert run_here(["report", str(tmp_path), "--hold-out", what]) == 2
    assert "--hold-out must be processes=N, batch-size=N" in capsys.readouterr().err
