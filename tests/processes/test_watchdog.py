"""A rank whose main thread is stuck in a call that does not return ends, and says why.

The call is one of C, without a time limit, which no signal interrupts; `IS_CUDA` says that it waits for a lost rank.
"""

from __future__ import annotations

import platform
import re
import statistics
import time
from types import SimpleNamespace

import pytest
from forked import run_forked

from mnist_dist.training.trainer import Trainer

ME = re.escape(platform.node())
WORDS = ["train", "--wandb", "disabled", "--compile", "off", "--batch-size", "100", "--output-dir", "run",
         "--epochs", "9"]
# size, options, variables, exit status of the stuck rank, and the line
CASES = {
    "SIGTERM, alone": (1, [], {"SIGNAL_AFTER": "0.3"}, 143,
                       r"stopped by SIGTERM after step \d+, without a checkpoint: a call does not return"),
    "lost": (2, [], {"KILLED": "1", "IS_CUDA": "yes"}, 1,
             rf"process 0 lost process 1 of 2 on {ME} after step \d+: a call of the GPU does not return"),
    "SIGTERM, lost": (2, [], {"KILLED": "1", "SIGNAL_AFTER": "0.1"}, 143,
                      r"stopped by SIGTERM after step \d+, without a checkpoint: a call does not return"),
    "timeout": (2, ["--timeout", 3], {"IS_CUDA": "yes"}, 1,
                r"process 0 timed out after step \d+: a call of the GPU does not return for 3 s"),
}


def stuck(data_dir, folder, *words, size=1, **environment):
    return run_forked([*WORDS, "--data-dir", data_dir, *words], cwd=folder, size=size, target="stuck:main", patience=20,
                      environment={"STUCK_AT": "0:6", **environment})


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long if case == "timeout" else ())
                                  for case in CASES])
def test_a_stuck_rank_ends_with_one_line(case, small_dir, tmp_path):
    size, words, environment, status, line = CASES[case]
    done = stuck(small_dir, tmp_path, *words, size=size, **environment)
    lines = [text for text in done.stderr.splitlines() if text.startswith("mnist-dist: error: ")
             and "error: process 1 " not in text]
    assert len(lines) == 1 and re.fullmatch(f"mnist-dist: error: {line}", lines[0]), done.stderr
    assert done.returncode not in (0, None) and (size > 1 or done.returncode == status), done.stderr
    assert not list((tmp_path / "run").rglob("step-*")) or size > 1


@pytest.mark.faults
@pytest.mark.parametrize("case", ["lost", "SIGTERM, alone", "SIGTERM, lost"])
def test_twenty_times_with_the_time_limits_of_use(case, small_dir, tmp_path):
    size, words, environment, _, line = CASES[case]
    seconds = []
    for number in range(20):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        done = stuck(small_dir, folder, *words, size=size, IN_EARNEST="yes", **environment)
        seconds.append(time.time() - float((folder / "stuck_at").read_text())
                       - float(environment.get("SIGNAL_AFTER", 0)))
        assert re.search(f"^mnist-dist: error: {line}$", done.stderr, re.MULTILINE), done.stderr
    middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
    print(f"{case}: 20 of 20, ended after {middle:.1f} s ({low:.1f} to {high:.1f})")


def test_a_rank_that_waits_for_a_slow_one_is_not_watched():
    """While the ranks agree, over gloo; while it takes steps, it is."""
    trainer, signs = object.__new__(Trainer), []

    def note(*_):
        signs.append(trainer.sign)

    trainer.team, trainer._window = SimpleNamespace(signs=3), SimpleNamespace(samples=[100], lap=None)
    trainer.epoch, trainer.left, trainer._warm_left = 0, range(9), 0
    trainer.step = SimpleNamespace(take=note, flush=note)
    schedule = SimpleNamespace(next_stop=lambda epoch, step: 4, poll=note, is_pause_due=lambda *_: False)
    assert not trainer.advance(schedule)
    assert signs == [(1, 3), (1, 3), None] and trainer.sign is None


@pytest.mark.long
def test_a_call_that_holds_the_lock_ends_after_the_timeout(small_dir, tmp_path):
    done = stuck(small_dir, tmp_path, "--timeout", 3, size=2, HOLDS_LOCK="yes", IS_CUDA="yes")
    assert done.returncode not in (0, None)
    assert "Timeout (0:00:04)!" in done.stderr and "in block" in done.stderr, "faulthandler's stacks"
