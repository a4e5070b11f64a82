"""A rank that is slower than the others is named, although all ranks' steps take equally long."""

from __future__ import annotations

import platform

import pytest
from forked import run_forked
from support import result_of

WORDS = ["train", "--max-steps", "12", "--batch-size", "48", "--wandb", "disabled", "--checkpoint-every", "never"]


@pytest.mark.parametrize("kind", ["plain", "exact", pytest.param("compiled", marks=pytest.mark.faults)])
def test_a_slow_rank_is_named(kind, small_dir, tmp_path):
    rest = {"plain": ["--compile", "off"], "exact": ["--reproducible"], "compiled": ["--compile", "on"]}[kind]
    done = run_forked([*WORDS, *rest, "--data-dir", small_dir, "--output-dir", tmp_path / "run"], cwd=tmp_path, size=2,
                      target="straggler:main")
    assert done.returncode == 0, done.stderr
    ranks = result_of(tmp_path / "run")["epochs"][0]["ranks"]
    assert (ranks["slowest_rank"], ranks["slowest_host"]) == (1, platform.node())
    assert ranks["step_ms"]["max"] < 1.2 * ranks["step_ms"]["min"], "they wait for each other"
    assert ranks["own_ms"]["max"] > ranks["own_ms"]["min"] + 50.0, "100 ms of sleep in each step"
    assert ranks["data_wait_ms"]["max"] < 50.0, "the data is not what it waits for"
