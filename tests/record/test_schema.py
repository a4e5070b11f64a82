"""What is read as a record has the types of a record; every field of every record is tried with a wrong one."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
from support import epoch_record, run_result

from mnist_dist.errors import UserError
from mnist_dist.record.environment import Environment
from mnist_dist.record.metrics import EpochRecord, RunSummary, record_from
from mnist_dist.record.result import read_result
from mnist_dist.record.schema import check_types
from mnist_dist.study.plan.table import read_contract

EVALUATION = {"step": 5, "samples": 50, "train_seconds": 1.0, "test_nll": 0.5, "test_accuracy": 0.9}
RESULT = run_result([epoch_record(evaluations=[EVALUATION], windows=[[300, 60_000, 1.0]])])
RECORDS = {EpochRecord: asdict(RESULT.epochs[0]), RunSummary: asdict(RESULT.summary),
           Environment: asdict(RESULT.environment)}
WRONG = ["x", True, [], {}, [[]], float("nan"), float("inf"), 10**30, {"x": 1}]
FIELDS = [(kind, option.name) for kind in RECORDS for option in fields(kind)]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_wrong_type_is_named(kind, name):
    """At least the values that are of no use there; which these are follows from the field's own type."""
    values = json.loads(json.dumps(RECORDS[kind]))
    assert record_from(kind, values, "here") is not None
    refused = 0
    for wrong in WRONG:
        try:
            record_from(kind, {**values, name: wrong}, "here")
        except (ValueError, TypeError) as error:
            refused += 1
            assert name in str(error) and len(str(error)) < 300
    assert refused >= 5


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_what_another_training_leaves_out_is_right(kind, name):
    values = json.loads(json.dumps(RECORDS[kind]))
    check_types(kind, {**values, name: None}, is_partial=True)
    del values[name]
    check_types(kind, values, is_partial=True)
    check_types(kind, {**values, "of a later version": {}}, is_partial=True)


@pytest.mark.parametrize(("place", "wrong"), [
    (("epochs", 0, "windows"), "x"), (("epochs", 0, "windows"), [[1, 2]]),
    (("epochs", 0, "windows"), [["a", "b", "c"]]),
    (("epochs", 0, "ranks"), [1]), (("epochs", 0, "ranks"), {"count": 1}), (("environment", "num_threads"), "two"),
    (("summary", "targets"), [{"target_nll": "x"}]), (("config",), [1]), (("config", "seed"), [1]),
    (("dataset", "train"), "many"), (("environment", "device"), 3), (("epochs", 0, "noise_scale"), "x"),
])
def test_a_result_of_a_script(place, wrong, tmp_path):
    """`study --script`: its result.json is read by the study, which copies it into its table."""
    (tmp_path / "result.json").write_text(json.dumps(asdict(RESULT)))  # its windows are in the epochs
    assert read_contract(tmp_path)["status"] == "completed" and read_result(tmp_path).epochs == RESULT.epochs
    values = json.loads((tmp_path / "result.json").read_text())
    inner = values
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = wrong
    (tmp_path / "result.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=place[0] if isinstance(place[0], str) else "") as caught:
        read_contract(tmp_path)
    assert len(str(caught.value)) <= 400
