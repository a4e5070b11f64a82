"""What is said before processes are started on this machine."""

from __future__ import annotations

import pytest

from mnist_dist.processes import spawn
from mnist_dist.processes.launch_environment import read_launch


@pytest.mark.parametrize("cores, processes, warning", [
    (2, 2, None), (2, 1, None), (8, 3, None),
    (2, 3, "3 processes on 2 cores take turns: a step takes longer than with 2 processes"),
    (1, 2, "2 processes on 1 core take turns: a step takes longer than with 1 process"),
])
def test_more_processes_than_cores_are_warned_of(cores, processes, warning, monkeypatch):
    monkeypatch.setattr(spawn, "num_cores", lambda: cores)
    monkeypatch.setattr(spawn, "runs_on_cpu", lambda launch: True)
    assert spawn.too_many(read_launch({}), processes) == warning
    monkeypatch.setattr(spawn, "runs_on_cpu", lambda launch: False)
    assert spawn.too_many(read_launch({}), processes) is None, "on GPUs each process has one"
