"""What several tests of studies need: a refused command line, and reports that take less time."""

from __future__ import annotations

import pytest
from support import run_here

from mnist_dist.study.analysis import critical_batch, step_time_fit

COUNTS_DRAWS = ("test_step_time", "test_critical_batch", "test_step_time_section")


@pytest.fixture(autouse=True)
def few_draws(request, monkeypatch):
    """Reports with fewer draws, so that their intervals are rougher; not in the tests of the intervals."""
    if request.module.__name__ not in COUNTS_DRAWS:
        monkeypatch.setattr(step_time_fit, "DRAWS", 40)
        monkeypatch.setattr(step_time_fit, "LEAST_DRAWS", 10)
        monkeypatch.setattr(critical_batch, "DRAWS", 200)


@pytest.fixture
def assert_refused(tmp_path, monkeypatch, capsys):
    """`mnist-dist study WORDS` ends with status 2 and one line that has the message, and writes nothing."""
    def check(words, message):
        monkeypatch.chdir(tmp_path)
        assert run_here(["study", *words, "--output-dir", "s"]) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and message in errors and not list(tmp_path.iterdir())

    return check
