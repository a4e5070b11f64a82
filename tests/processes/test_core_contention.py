"""Beside a busy process: it is seen, OpenMP's spins become short and long again, and no bit of a result changes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, threads

from mnist_dist.processes import core_contention
from mnist_dist.processes.core_contention import CoreContention, openmp_may_spin

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux counts this, and not all do")


def all_waiting():
    """A thread waits all of the time."""
    return 0.0, time.monotonic()


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(core_contention, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(core_contention, "SHORT_SPINS_SECONDS", (0.5, 1.0))
    with threads(2):
        yield


def num_tasks():
    return len(os.listdir("/proc/self/task"))


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_it_is_for_openmp_threads_on_the_cpu_whose_spins_the_user_has_not_chosen(two_threads, monkeypatch, tmp_path):
    assert openmp_may_spin(on_cpu=True) and not openmp_may_spin(on_cpu=False)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        with monkeypatch.context() as only_here:
            only_here.setenv(name, "active")
            assert not openmp_may_spin(on_cpu=True)
    with threads(1):
        assert not openmp_may_spin(on_cpu=True)
    monkeypatch.setattr(core_contention, "PROCESS", tmp_path)  # another system, or a Linux that does not count
    assert not openmp_may_spin(on_cpu=True)


def test_threads_that_share_a_core_wait():
    """Two busy processes on one core: each waits half of the time."""
    script = ("import os, subprocess, sys, time; from mnist_dist.processes.core_contention import seconds_used\n"
              "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
              "with subprocess.Popen([sys.executable, '-c', 'while True: pass']) as other:\n"
              "    end = time.monotonic() + 1.0\n"
              "    while time.monotonic() < end: pass\n"
              "    other.kill()\n"
              "print(*seconds_used())")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    ran, waited = map(float, done.stdout.split())
    assert ran > 0.05 < waited, done


def test_a_pool_is_held_while_others_are_seen_and_let_go_after(two_threads, monkeypatch):
    torch.ones(200_000).add_(1)  # this thread's own pool
    waited = 0.0
    monkeypatch.setattr(core_contention, "seconds_used", lambda: (0.0, waited))
    with CoreContention(on_cpu=True) as watch:
        before, cores = num_tasks(), len(os.sched_getaffinity(0))
        waited += 1000
        assert until(lambda: watch.active) and num_tasks() == before + cores  # who holds it is one of the pool
        assert until(lambda: num_tasks() == before) and not watch.active
        assert torch.get_num_threads() == 2
        assert watch.seconds >= 0.5


def test_loops_take_one_thread_within_the_context_and_all_of_them_after():
    """OpenMP starts its threads at the first loop that takes them."""
    script = ("import os, torch; from mnist_dist.processes.core_contention import one_thread\n"
              "torch.set_num_threads(2); x = torch.empty(200_000)\n"
              "def tasks(): x.add_(1); return len(os.listdir('/proc/self/task'))\n"
              "before = len(os.listdir('/proc/self/task'))\n"
              "with one_thread(): within = tasks()\n"
              "print(within - before, tasks() - before)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0", "1"], done


def test_it_is_held_twice_as_long_each_time_that_others_are_still_there(two_threads, monkeypatch):
    held = []
    monkeypatch.setattr(CoreContention, "_hold_threads", lambda self, seconds: held.append(seconds))
    monkeypatch.setattr(core_contention, "seconds_used", all_waiting)
    with CoreContention(on_cpu=True):
        assert until(lambda: len(held) >= 4)
    assert held[:4] == [0.5, 1.0, 1.0, 1.0]


def test_threads_that_wait_for_our_own_others_change_nothing(two_threads, monkeypatch):
    """As beside the thread that writes a checkpoint: all cores are busy with us."""
    held, cores = [], len(os.sched_getaffinity(0))
    monkeypatch.setattr(CoreContention, "_hold_threads", lambda self, seconds: held.append(seconds))
    monkeypatch.setattr(core_contention, "seconds_used", lambda: (cores * time.monotonic(), time.monotonic()))
    with CoreContention(on_cpu=True) as watch:
        time.sleep(0.2)
    assert not held and watch.seconds == 0


def name_of_thread(task):
    """The thread's name; "" if it has ended since it was listed."""
    try:
        return (task / "comm").read_text()
    except FileNotFoundError:
        return ""


def test_the_end_of_the_run_does_not_wait_for_the_pool(two_threads, monkeypatch):
    monkeypatch.setattr(core_contention, "SHORT_SPINS_SECONDS", (60.0, 60.0))
    monkeypatch.setattr(core_contention, "seconds_used", all_waiting)
    with CoreContention(on_cpu=True):
        time.sleep(0.1)
    assert not [name for name in map(name_of_thread, Path("/proc/self/task").iterdir())
                if "idle pool" in name]


@pytest.mark.faults
def test_a_run_beside_a_busy_process_says_so_and_has_the_same_bits(small_dir, tmp_path):
    """On two cores of this machine's, with a busy process on each, so that OpenMP's threads do wait."""
    def trained(name, busy):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            done = subprocess.run(
                [sys.executable, "train.py", "--data-dir", str(small_dir), "--epochs", "100", "--compile", "off",
                 "--wandb", "disabled", "--checkpoint-every", "never", "--output-dir", str(tmp_path / name)],
                cwd=ROOT, capture_output=True, text=True, timeout=120,
                env={**os.environ, "OMP_NUM_THREADS": "2"})
        finally:
            for other in others:
                other.kill()
                other.wait()
        assert done.returncode == 0, done.stderr
        return re.search(r"warning: CPU shared with other processes for \d+ s", done.stdout), load_file(
            tmp_path / name / "model.safetensors")

    (_, alone), (line, beside) = trained("alone", 0), trained("beside", os.cpu_count())
    assert line
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
