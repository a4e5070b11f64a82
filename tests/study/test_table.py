"""The table of a study: what is in no contract is refused when the run ends, and what is accepted gives a report."""

from __future__ import annotations

import copy
import json

import pytest
from tables import row, study, windows_of

from mnist_dist.errors import UserError
from mnist_dist.record.rank_summary import over_ranks
from mnist_dist.study.analysis import critical_batch
from mnist_dist.study.plan.grid import Cell
from mnist_dist.study.plan.table import read_contract, read_table, unit_of, write_table
from mnist_dist.study.report import charts, report
from mnist_dist.study.report.page import Picture

WRONG = (None, "x", -1, 0, True, 1e308, 10**30, float("nan"), [], {}, [[1]], {"a": 1})
RANK = {"step_ms": 9.0, "own_ms": 3.0, "data_wait_ms": 0.1, "peak_memory_bytes": 10**9, "host": "abacus"}


def whole():
    """A row with every field that a report reads."""
    one = row(Cell(50, 2), 1000.0, 1, windows=windows_of([3.0] * 9, batch=50))
    evaluations = [{"step": step, "samples": 50 * step, "train_seconds": 1.0, "test_nll": nll, "test_accuracy": 0.9}
                   for step, nll in ((10, 0.5), (20, 0.2))]
    one["epochs"][0] |= {"epoch": 0, "step": 45, "test_nll": 0.1, "noise_scale": 300.0, "evaluations": evaluations,
                         "ranks": over_ranks([RANK, RANK]), "peak_memory_bytes": 10**9, "train_seconds": 2.5}
    one["summary"]["targets"] = [{"target_nll": 0.3, "step": 20, "samples": 1000, "train_seconds": 1.0,
                                  "test_nll": 0.2}]
    one["epochs"][0]["evaluations"] = [evaluation | {"accuracy": 1 - evaluation["test_nll"]}
                                       for evaluation in evaluations]
    one["summary"]["targets"].append({"name": "accuracy", "value": 0.7, "direction": "higher", "step": 20,
                                      "samples": 1000})
    one["summary"] |= {"unit": "tokens", "units_per_sample": 16, "flop_per_sample": 1.2e6, "printed_rates": 9}
    one["environment"] |= {"device": "cpu", "num_machines": 1, "num_threads": 1, "torch": "2.6", "step": "plain"}
    return one | {"config": {"seed": 0, "batch_size": 50}, "dataset": {"name": "mnist", "train": 60_000}}


def places(value, path=()):
    """Every place in nested mappings and lists; of most lists the first."""
    yield path
    inside = value.items() if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else ()
    if path and path[-1] != "targets":
        inside = list(inside)[:1] if isinstance(value, list) else inside  # targets are of two kinds
    for name, inner in inside:
        yield from places(inner, (*path, name))


RESULT = {name: value for name, value in whole().items()
          if name in ("status", "config", "dataset", "environment", "epochs", "summary")}


@pytest.fixture
def quick_report(monkeypatch):
    """A report that draws and models nothing, which takes most of its time and has its own tests."""
    monkeypatch.setattr(report, "judge", lambda *values: {})
    monkeypatch.setattr(charts, "draw", lambda folder, name, alt, *values, **others: Picture(name, alt, "<svg/>"))
    monkeypatch.setattr(critical_batch, "DRAWS", 10)
    return report.write_report


@pytest.mark.parametrize("place", [path for path in places(RESULT) if path], ids=lambda path: ".".join(map(str, path)))
def test_a_wrong_value_is_refused_or_reported(place, tmp_path, quick_report):
    """Each field of a result, with values of every wrong type, and without it."""
    others = [whole() | {"run": f"other-{number}", "repeat": number, "config": {"seed": number}} for number in (2, 3)]
    others += study({Cell(50, 1): 900.0}, 3, 0.01, seed=1)
    for other in others:
        other["summary"]["unit"] = "tokens"
    for wrong in (*WRONG, "left out"):
        result = copy.deepcopy(RESULT)
        parent = result
        for name in place[:-1]:
            parent = parent[name]
        if wrong == "left out":
            del parent[place[-1]]
        else:
            parent[place[-1]] = wrong
        (tmp_path / "result.json").write_text(json.dumps(result))
        try:
            accepted = read_contract(tmp_path)
        except UserError as error:
            assert "its result.json" in str(error) and len(str(error)) < 400
            continue
        row_of_it = {**whole(), **accepted, "status": "completed"}
        if unit_of(row_of_it) != "tokens":
            with pytest.raises(UserError, match="a study has one unit"):
                quick_report(tmp_path, [row_of_it, *others])
        else:
            quick_report(tmp_path, [row_of_it, *others])


def test_windows_must_add_up(tmp_path):
    for factor, problem in (([1, 1.01, 1], r"they have 2272\.5 samples"), ([1, 1, 0.7], "seconds, and measured_sec")):
        result = copy.deepcopy(RESULT)
        windows = result["epochs"][0]["windows"]
        result["epochs"][0]["windows"] = [[a * b for a, b in zip(window, factor, strict=True)] for window in windows]
        (tmp_path / "result.json").write_text(json.dumps(result))
        with pytest.raises(UserError, match=rf"epochs\[0\]\.windows .*{problem}"):
            read_contract(tmp_path)


def test_one_run_is_in_one_row(tmp_path):
    write_table(tmp_path, [row(Cell(50, 1), 10.0, 1), row(Cell(50, 1), 10.0, 2), row(Cell(50, 1), 11.0, 1)])
    with pytest.raises(UserError, match="lines 1 and 3, are both of the run b50-p1-repeat-1: delete one of them"):
        read_table(tmp_path)
