"""Training in other processes: a failure is an outcome, and no process is left, whatever happens."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import psutil
import pytest
from support import run_result

from mnist_dist import runner
from mnist_dist.record.result import write_result

WORDS = ["--wandb", "disabled", "--checkpoint-every", "never", "--batch-size", 50]


@pytest.mark.long
def test_a_training_and_its_result(small_dir, tmp_path):
    outcome = runner.train(["--data-dir", small_dir, "--max-steps", 3, *WORDS], tmp_path / "run", processes=2)
    assert (outcome.status, outcome.note) == (0, "")
    assert outcome.result.environment.num_processes == 2 and outcome.result.epochs[0].step == 3


def test_a_failed_training_is_an_outcome(small_dir, tmp_path):
    write_result(tmp_path, run_result([]))
    for words, status, note in (
        (["--lr", "-1"], 2, "mnist-dist: error: --lr must be above 0, got -1.0"),
        (["--data-dir", small_dir], 2, f"mnist-dist: error: --output-dir {tmp_path} already holds a run"),
    ):
        outcome = runner.train([*words, *WORDS], tmp_path)
        assert (outcome.status, outcome.result) == (status, None), "the result of another run is not its result"
        assert outcome.note.startswith(note)


def test_divergence_has_a_result_and_a_note(small_dir, tmp_path):
    outcome = runner.train(["--data-dir", small_dir, "--lr", 1e38, *WORDS], tmp_path / "run")
    assert outcome.status == 3 and outcome.result.status == "diverged" and "training diverged" in outcome.note


TREE = """
import subprocess, sys, time
child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', " \\
        "{path!r}], start_new_session=True); print('child', flush=True); time.sleep({child})"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=open({path!r}, "w"))
while not open({path!r}).read(): time.sleep(0.01)
time.sleep({parent})
"""


def alive(path):
    """Processes whose command line names the path."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(path) in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.parametrize("orphaned", [False, True])
def test_a_tree_is_ended_whole(orphaned, tmp_path):
    """A grandchild in a session of its own, which here has lost its parent, ends with the command."""
    code = TREE.format(child=0 if orphaned else 600, path=str(tmp_path / "started"), parent=600)
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        runner.run([sys.executable, "-c", code], timeout=2)
    assert time.monotonic() - begin < 30 and (tmp_path / "started").read_text()
    assert not alive(tmp_path / "started")


def test_what_a_command_leaves_behind_is_ended(tmp_path):
    code = TREE.format(child=600, path=str(tmp_path / "started"), parent=0)
    assert runner.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert not alive(tmp_path / "started")


@pytest.mark.long
def test_a_training_beyond_its_time_is_ended(small_dir, tmp_path):
    outcome = runner.train(["--data-dir", small_dir, "--epochs", 10**6, *WORDS], tmp_path / "run", processes=2,
                           timeout=6)
    assert outcome.result is None and outcome.note == "no result after 6 s: ended" and outcome.status < 0
    assert not alive(tmp_path / "run")


def test_the_error_is_found_above_what_a_launcher_writes():
    last_error = runner.last_error
    traceback = "Traceback (most recent call last):\n  File x\nValueError: 2 ranks cannot\n"
    assert last_error(traceback) == "ValueError: 2 ranks cannot"
    launched = f"[rank0]: {traceback.replace(chr(10), chr(10) + '[rank0]: ')}x.errors.ChildFailedError: \n=====\n"
    assert last_error(launched) == "ValueError: 2 ranks cannot"
    assert last_error("mnist-dist: error: --lr must be\n") == "mnist-dist: error: --lr must be"
    rules = 60 * "="
    torchruns = (f"torch.distributed.elastic.errors.ChildFailedError: \n{rules}\nbad.py FAILED\nFailures:\n"
                 "[1]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : 9 (pid: 23141)\n"
                 "Root Cause (first observed failure):\n"
                 f"[0]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : 7 (pid: 23140)\n{rules}\n")
    assert last_error(torchruns) == "rank 0 ended with exit status 7 and without a message"
    assert last_error(f"ValueError: bad\n{torchruns}") == "ValueError: bad"
    assert last_error("Killed\n\n") == "Killed" and last_error("") == ""
