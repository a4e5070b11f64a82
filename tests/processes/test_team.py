"""Collectives: the same bits on any number of them, and what the others see when one fails, hangs or is slow."""

from __future__ import annotations

import threading

import pytest
import torch
from support import take_steps
from thread_team import Fault, Meeting, run_ranks

from mnist_dist.config import Every, TrainConfig
from mnist_dist.data import load
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.stopwatch import Stopwatch
from mnist_dist.training.pauses import PauseSchedule
from mnist_dist.training.trainer import Trainer

STEPS = 5
making = threading.Lock()  # the weights are drawn from torch's one generator


@pytest.fixture(scope="module")
def sets(small_dir):
    return load("mnist", str(small_dir))


def train(team, sets):
    """Some steps of the exact kind, and an evaluation: (weights, figures, steps done)."""
    with making:
        trainer = Trainer(TrainConfig(batch_size=97, lr=1e-3, reproducible=True), team, sets)
        trainer.make_step()
    schedule = PauseSchedule(Every(0, "epochs"), trainer.batches.num_batches, team)
    take_steps(trainer, 0, range(STEPS), Stopwatch(team.synchronize), schedule)
    loss = trainer.train_loss(0, STEPS)
    return torch.cat([weight.detach().flatten() for weight in trainer.module.parameters()]), loss, trainer.evaluate()


@pytest.fixture(scope="module")
def alone(sets):
    (outcome,) = run_ranks(Meeting(1, 20.0), lambda team: train(team, sets))
    return outcome


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_same_bits_on_any_number_of_ranks(size, sets, alone):
    for weights, loss, metrics in run_ranks(Meeting(size, 20.0), lambda team: train(team, sets)):
        assert torch.equal(weights, alone[0]) and (loss, metrics) == alone[1:]


def test_a_slow_rank_changes_nothing(sets, alone):
    outcomes = run_ranks(Meeting(2, 20.0, [Fault(1, 2, "slow")]), lambda team: train(team, sets))
    assert all(torch.equal(weights, alone[0]) for weights, *_ in outcomes)


@pytest.mark.parametrize("kind", ["fail", "hang"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_others_end_when_a_rank_does(kind, rank, sets):
    meeting = Meeting(4, 1.0, [Fault(rank, 3, kind)])
    outcomes = run_ranks(meeting, lambda team: train(team, sets))
    assert isinstance(outcomes.pop(rank), MnistDistError)
    assert all(isinstance(outcome, RuntimeError) and "did not come" in str(outcome) for outcome in outcomes)


def test_an_error_on_one_rank_is_everyones():
    def work(team):
        def task():
            if team.rank == 1:
                raise UserError("rank 1 cannot")
            return team.rank
        return team.run_on("every", task)

    outcomes = run_ranks(Meeting(3, 5.0), work)
    assert [str(outcome) for outcome in outcomes] == ["rank 1 cannot"] * 3


def test_results_are_shared():
    outcomes = run_ranks(Meeting(3, 5.0), lambda team: (
        team.run_on("main", lambda: team.rank + 10), team.run_on("every", lambda: team.rank), team.max(team.rank, 1.0),
    ))
    assert outcomes == [(10, rank, [2, 1.0]) for rank in range(3)]
