"""What a checkpoint keeps of a run's progress, and what is refused that another program wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import epoch_record

from mnist_dist.errors import UserError
from mnist_dist.record.checkpoint import Checkpoint
from mnist_dist.training.progress import Progress


def one_and_a_half():
    """An epoch of 10 steps, and 5 of the next."""
    progress = Progress("0123abcd", 10)
    progress.records.append(epoch_record(step=10))
    progress.next_epoch()
    progress.step, progress.watch = 5, {"seconds": 0.5, "samples": 100}
    progress.evaluations.append({"step": 12, "test_nll": 0.5})
    progress.ending = epoch_record(epoch=1, step=15)
    return progress


def kept(**changes):
    state = json.loads(json.dumps(one_and_a_half().state()))
    return Checkpoint(Path("run/checkpoints/step-000000015"), {}, {**state, **changes})


def test_it_is_restored_as_it_was():
    found = Progress("ffffffff", 10)
    found.restore(kept())
    assert found == one_and_a_half()
    assert found.global_step == 15 and found.records == [epoch_record(step=10)]
    assert found.all_records == [epoch_record(step=10), epoch_record(epoch=1, step=15)]


@pytest.mark.parametrize("changes", [
    {"epoch": "1"}, {"epoch": None}, {"epoch": 1.5}, {"epoch": -1, "step": 25}, {"step": -5, "epoch": 2}, {"step": 6},
    {"run_id": "../../etc"}, {"run_id": 7}, {"run_id": "0123abcd\n"}, {"records": 5}, {"records": ["{}"]},
    {"records": ["nothing"]}, {"records": [3]}, {"records": ["[" * 100_000]},
    {"watch": {"seconds": "1"}}, {"watch": {"unknown": 1.0}}, {"evaluations": 3}, {"evaluations": [3]},
    {"ending": 3}, {"ending": "{}"}, {"ending": "nothing"},
])
def test_of_another_program(changes):
    with pytest.raises(UserError, match=r"step-000000015.*--output-dir|has no .*train again") as caught:
        Progress("ffffffff", 10).restore(kept(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["epoch", "step", "run_id", "records", "watch", "evaluations", "ending"])
def test_something_is_missing(name):
    without = kept()
    del without.state[name]
    with pytest.raises(UserError, match=f"not a checkpoint of this program .*{name}"):
        Progress("ffffffff", 10).restore(without)
