"""Reports of made-up studies, with fewer draws: what draws are for has tests of its own."""

from __future__ import annotations

import pytest

from mnist_dist.study import critical, step_time

COUNTS_DRAWS = ("test_step_time", "test_critical", "test_model_section")


@pytest.fixture(autouse=True)
def few_draws(request, monkeypatch):
    """The intervals of models are then rougher."""
    if request.module.__name__ not in COUNTS_DRAWS:
        monkeypatch.setattr(step_time, "DRAWS", 40)
        monkeypatch.setattr(step_time, "LEAST_DRAWS", 10)
        monkeypatch.setattr(critical, "DRAWS", 200)
