"""The statistics on real runs: 40 repeats of two cells (docs/studies.md), cut at random into two studies of 20.

The two are of the same thing, so a difference between them would be an error; then one of them is made 3 % slower.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
from support import ROOT

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.comparison import compare
from mnist_dist.study.plan.table import read_table

STUDIES = 20


@pytest.fixture(scope="module")
def rows():
    """The repeats, without the runs that check for drift."""
    return [row for row in read_table(ROOT / "docs" / "studies" / "repeats") if row["role"] == "repeat"]


def halves(rows, seed):
    """Two studies of 20 repeats of each cell, drawn without replacement."""
    first = set(np.random.default_rng(seed).permutation(np.arange(1, 41))[:20])
    return ([row for row in rows if (row["repeat"] in first) == mine] for mine in (True, False))


def differs(cell):
    """Whether a comparison calls the cell's throughput or its undisturbed rate another."""
    return cell.throughput.excludes(1) or cell.undisturbed.excludes(1)


def test_twenty_studies_of_the_same_thing(rows):
    assert len(rows) == 80 and {row["status"] for row in rows} == {"completed"}
    found = [any(map(differs, compare(*map(Analysis, halves(rows, seed))).differences)) for seed in range(STUDIES)]
    print(f"\n{sum(found)} of {STUDIES} comparisons of the same thing report a difference")
    assert sum(found) <= 1


def test_a_slow_down_of_three_percent(rows):
    found, in_throughput = [], []
    for seed in range(STUDIES):
        before, after = halves(copy.deepcopy(rows), seed)
        for row in after:
            for epoch in row["epochs"]:
                if row["global_batch_size"] == 50:
                    epoch["measured_seconds"] /= 0.97
                    for window in epoch["windows"]:
                        window[2] /= 0.97
        changed, same = compare(Analysis(before), Analysis(after)).differences
        assert (changed.cell.global_batch_size, same.cell.global_batch_size) == (50, 200)
        found.append(differs(changed))
        in_throughput.append(changed.throughput.excludes(1))
        assert not differs(changed) or min(changed.throughput.value, changed.undisturbed.value) < 1
    print(f"\n{sum(found)} of {STUDIES} comparisons find a slow-down of 3 %, {sum(in_throughput)} in throughput alone")
    assert sum(found) >= 19
