"""What joins the processes of a study: read from the doctor, kept in the table, and beside the model in the report."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support import mnist_dist, run_here
from test_step_time_section import TRUTH, rates_of, section, tables_of

from mnist_dist.study.analysis.measured_network import (
    GRADIENT_NUMBERS,
    AllReduceTimes,
    all_reduce_times_of,
    from_doctor,
)
from mnist_dist.study.analysis.step_time import LATENCY, TRANSFER, Place, seconds
from mnist_dist.study.analysis.step_time_fit import Cells, fit
from mnist_dist.study.plan.table import read_table
from mnist_dist.training.model import MLP

LATENCY_SECONDS, BYTES_PER_SECOND = 20e-6, 1e9
SIZES = [4 * 4**n for n in range(13)]


def fabric(processes=2, machines=1, sizes=SIZES):
    """A ring without any noise."""
    n = processes
    times = [2 * (n - 1) * LATENCY_SECONDS + 2 * (n - 1) / n * size / BYTES_PER_SECOND for size in sizes]
    return AllReduceTimes(n, machines, "gloo over veth0", 4 * GRADIENT_NUMBERS, list(zip(sizes, times, strict=True)))


def test_the_gradient_is_our_models():
    assert sum(weight.numel() for weight in MLP().parameters()) == GRADIENT_NUMBERS


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:8]])  # a slow network: the last size is smaller than the gradient
def test_a_ring_is_found_again(processes, sizes):
    found = fabric(processes, sizes=sizes)
    latency, transfer = found.ring
    assert latency == pytest.approx(LATENCY_SECONDS, rel=1e-3)
    assert transfer == pytest.approx(4 * GRADIENT_NUMBERS / BYTES_PER_SECOND, rel=1e-3)
    place = Place(1, processes)
    model = np.array([0, 0, 0, latency, transfer, 0, 0])
    assert found.seconds(found.gradient_bytes) == pytest.approx(seconds(model, [place])[0], rel=1e-9)


def test_it_is_kept_in_a_table():
    assert all_reduce_times_of(json.loads(json.dumps(fabric().as_row()))) == fabric()


@pytest.mark.parametrize("damage", [
    {"all_reduce": []}, {"all_reduce": [[4, 1e-5]]}, {"all_reduce": [[4, 1e-5], [4, 2e-5]]},
    {"all_reduce": [[4, 0.0], [16, 1.0]]}, {"all_reduce": [[4, math.nan], [16, 1.0]]}, {"all_reduce": [4, 16]},
    {"processes": 1}, {"processes": "x"}, {"machines": 0}, {"gradient_bytes": None}, {"gradient_bytes": -1},
])
def test_what_is_damaged_is_none(damage):
    assert all_reduce_times_of({**fabric().as_row(), **damage}) is None
    assert all_reduce_times_of(None) is None and all_reduce_times_of([1]) is None


@pytest.mark.long
def test_of_the_doctor(tmp_path):
    done = mnist_dist("doctor", "--json", "--dataset", "synthetic", "--wandb", "disabled", "--processes", 2,
                      cwd=tmp_path, ACCELERATE_USE_CPU="true")
    findings = json.loads(done.stdout)["findings"]
    found = from_doctor(findings, "float64")
    assert (found.processes, found.machines, found.name) == (2, 1, "gloo")
    assert [size for size, _ in found.points] == SIZES and found.gradient_bytes == 8 * GRADIENT_NUMBERS
    without = [one for one in findings if one["name"] != "all-reduce"]
    assert from_doctor(without, "float32") is None and from_doctor([], "float32") is None


def test_the_doctor_decides_what_the_cells_do_not():
    """One size of ring cannot tell latency from transfer."""
    places = [Place(batch // n, n) for n in (1, 2) for batch in (128, 512, 2048, 8192)]
    runs = [np.array([value] * 2) for value in seconds(TRUTH, places)]
    ring = (TRUTH[LATENCY], TRUTH[TRANSFER])
    alone, helped = fit(Cells(places, runs)), fit(Cells(places, runs), ring)
    assert helped.best.values[[LATENCY, TRANSFER]] == pytest.approx(ring, rel=0.05)
    assert alone.best.undecided == helped.best.undecided and {LATENCY, TRANSFER} <= helped.best.undecided
    assert abs(alone.best.values[LATENCY] / TRUTH[LATENCY] - 1) > 0.5
    ahead = Place(64, 64)
    right = seconds(TRUTH, [ahead])[0]
    assert helped.predict([ahead])[0].value == pytest.approx(right, rel=0.05)
    low, before = (model.predict([ahead])[0].low for model in (helped, alone))
    assert low == pytest.approx(before), "it is as uncertain as before"


def test_the_report_shows_both(tmp_path):
    about = {"command": "mnist-dist study", "seed": 0, "date": "2026-11-26", "fabric": fabric().as_row()}
    text = section(tmp_path, rates_of((1, 2, 4)), study=about)
    latency, transfer = (next(line for line in tables_of(text) if line[0].startswith(words))
                         for words in ("latency of a message", "sending the gradient once"))
    assert (latency[2], transfer[2]) == ("0.0200", "0.814")
    # of 2: by the model's truth 2 latencies and the gradient once, 0.4 ms
    said = text.split("Exchanging the gradient over 2 processes takes ")[1]
    assert float(said.split(" ms")[0]) == pytest.approx(0.4, rel=0.2)
    assert "and 0.854 ms as the doctor has measured it (gloo over veth0)" in " ".join(said.split())
    footer = (tmp_path / "report.md").read_text().split("## How it was measured")[1]
    assert "gloo over veth0" in footer and "2 processes on 1 machine; an all-reduce of 4 bytes takes 40.0 µs" in footer


def test_a_report_without_it(tmp_path):
    text = section(tmp_path, rates_of((1, 2, 4)))
    assert "doctor" not in text and "doctor" not in (tmp_path / "report.md").read_text()


@pytest.mark.faults
def test_a_study_has_the_doctor_measure(tmp_path):
    words = ["study", "--batch-sizes", "500", "--processes", "1,2", "--repeats", "1", "--dataset", "synthetic",
             "--max-steps", "20", "--wandb", "disabled", "--output-dir", str(tmp_path)]
    assert run_here(words) == 0
    first = [row["study"]["fabric"] for row in read_table(tmp_path)]
    assert all(all_reduce_times_of(row).processes == 2 for row in first)
    assert len({json.dumps(row) for row in first}) == 1
    assert run_here(words) == 0
    assert [row["study"]["fabric"] for row in read_table(tmp_path)] == first, "it is measured once"
    assert "fabric: `gloo`, 2 processes on 1 machine" in (tmp_path / "report.md").read_text()
