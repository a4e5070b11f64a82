"""Plans of kills: a run that is killed at random moments and resumed learns what the run that was left alone does."""

from __future__ import annotations

import json
import sys

import pytest
from support import ROOT, run

from benchmarks.faults import EPOCHS


def campaign(output, data_dir, *words):
    """`python -m benchmarks.faults`: its exit status, and what it left."""
    done = run([sys.executable, "-m", "benchmarks.faults", data_dir, output, *words], cwd=ROOT, timeout=400)
    print(done.stdout, done.stderr)
    return done.returncode, json.loads((output / "faults.json").read_text())


@pytest.mark.faults
def test_a_short_plan_and_one_whose_reference_is_changed(small_dir, tmp_path):
    words = ["--kills", 1, "--seed", 17299, "--batch-size", 10]
    status, found = campaign(tmp_path / "out", small_dir, *words)
    assert status == 0 and found["wrong"] == [] and found["runs"] >= 1 <= found["kills"]
    assert len(found["reference"]["lines"]) == EPOCHS
    history = found["reference"]["history"]
    before = {"runs": 0, "starts": found["starts"][:1], "reference": {**found["reference"], "model": "0" * 64}}
    (tmp_path / "out" / "faults.json").write_text(json.dumps({**found, **before}))
    status, found = campaign(tmp_path / "out", small_dir, *words)
    assert status == 1 and len(found["wrong"]) == found["runs"] and "another model" in found["wrong"][0]
    if not history:
        pytest.skip("all is right but W&B's history: this version of wandb cannot read its own files back, 0.31 can")
    assert len(history) == EPOCHS


@pytest.mark.faults
def test_a_longer_plan(mnist_dir, tmp_path):
    """The same command goes on where it was ended: here at its end."""
    status, found = campaign(tmp_path / "out", mnist_dir, "--kills", 5, "--seed", 1)
    assert status == 0 and found["wrong"] == [] and found["kills"] >= 5
    assert campaign(tmp_path / "out", mnist_dir, "--kills", 5, "--seed", 1) == (0, found)
