"""A signal or an error at every system call with which a run's files are written: what was there is there, or the new.

strace joins the process that writes, and makes its n-th call of a kind fail, or ends it there.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT, mnist_dist, result_of

from mnist_dist.record.checkpoint import CheckpointWriter, load_newest

FAULTS = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")
FILES = {"config": "config.yaml", "metrics": "metrics.jsonl", "line": "metrics.jsonl", "result": "result.json"}
# a fault at these shows how the test is made: the file of tensors is in memory already
NOT_OF_THE_DISK = {"mmap", "munmap", "read"}


class Worker:
    """disk_worker.py: writes one thing after the other, with strace beside it."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "disk_worker.py")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})

    def write(self, what, folder, log, *words):
        """Do it under strace with these words; returns what was said, and the lines of the log."""
        self._say({"what": what, "folder": str(folder)})
        said = {"status": None, **self._hear()}
        strace = subprocess.Popen(["strace", "-f", "-y", "-o", str(log), "-e", "trace=%file,%desc", *words, "-p",
                                   str(said["pid"])], stderr=subprocess.PIPE, text=True)
        assert "attached" in strace.stderr.readline()
        self._say("go")
        while said["status"] is None:
            said |= self._hear()
        strace.communicate(timeout=20)
        return said, log.read_text().splitlines()

    def _say(self, line):
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def _hear(self):
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def worker():
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    started = Worker()
    yield started
    started.process.stdin.close()
    started.process.wait(timeout=20)


def calls(what, worker, folder):
    """Every system call that writing takes, as its name and its number among those of the same name and thread."""
    said, log = worker.write(what, folder, folder.with_suffix(".log"))
    assert said["status"] == 0 and "error" not in said and "traceback" not in said, said
    counts, found = {}, []
    for line in log:
        # the worker's own talk is on pipes
        if (call := re.match(r"(\d+) +(\w+)\(", line)) and "<pipe:" not in line and call[2] not in NOT_OF_THE_DISK:
            counts[call.groups()] = counts.get(call.groups(), 0) + 1
            found.append((call[2], counts[call.groups()]))
    needed = {"openat", "write"} if what == "line" else {"openat", "write", "fsync", "renameat"}
    assert needed <= {name for name, _ in found}
    return list(dict.fromkeys(found))


def every_fault(what, worker, tmp_path, some=1):
    """Each fault at each call, or at every so many: yields the folder, and what the process said."""
    wanted = calls(what, worker, tmp_path / "whole")
    cases = [(fault, name, number) for fault in FAULTS for name, number in wanted][::some]
    for case, (fault, name, number) in enumerate(cases):
        folder = tmp_path / f"{case}"
        said, log = worker.write(what, folder, tmp_path / f"{case}.log", "-e", f"inject={name}:{fault}:when={number}")
        at = f"{fault} at {name} number {number}"
        if "SIGKILL" in fault:
            assert said["status"] == -9, at
        else:
            assert any("(INJECTED)" in line for line in log), at
            assert "traceback" not in said, (at, said)
            assert "\n" not in said.get("error", "")
        yield at, folder, said
    print(f"\n{what}: {len(wanted)} system calls, {len(cases)} faults", end="")


def check_checkpoints(worker, tmp_path, some):
    for at, folder, said in every_fault("checkpoint", worker, tmp_path, some):
        found = load_newest(folder, lambda line, at=at: pytest.fail(f"{at}: {line}"))
        is_there = (folder / "step-000000003").exists()
        assert found.state == {"step": 3 if is_there else 2}, at
        assert found.tensors["weight"][0] == found.state["step"], at
        if "error" in said:
            assert "the checkpoint of step 3 could not be written" in said["error"], at
        else:
            assert is_there or said["status"] == -9, at
        with CheckpointWriter(folder, keep=2) as writer:
            writer.write(4, found.tensors, {"step": 4})
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [], "nothing is left behind"
        assert load_newest(folder, pytest.fail).state == {"step": 4}
        assert len(list(folder.iterdir())) == 2, "and the old ones are dropped"


def check_file(what, worker, tmp_path, some):
    whole = tmp_path / "whole"
    contents = None
    for at, folder, said in every_fault(what, worker, tmp_path, some):
        name = FILES[what]
        contents = contents or {(whole / name).read_bytes()}
        now = (folder / name).read_bytes()
        if now not in contents:  # the old one, which the first fault leaves
            assert len(contents) == 1, at
            contents.add(now)
        if "error" in said:
            assert re.search(r"could not be written \(.*\): free some space and continue with --resume", said["error"])
        elif said["status"] == 0:
            assert now == (whole / name).read_bytes(), at
    assert len(contents) == 2, "the old one and the new one"


@pytest.mark.faults
def test_a_checkpoint_at_every_call(worker, tmp_path):
    check_checkpoints(worker, tmp_path, some=1)


@pytest.mark.parametrize("what", [
    pytest.param(what, marks=pytest.mark.long if what == "config" else pytest.mark.faults) for what in FILES])
def test_a_file_at_every_call(what, worker, tmp_path):
    check_file(what, worker, tmp_path, some=1)


@pytest.mark.long
def test_a_checkpoint_at_some_calls(worker, tmp_path):
    check_checkpoints(worker, tmp_path, some=11)


def test_a_file_at_some_calls(worker, tmp_path):
    check_file("result", worker, tmp_path, some=7)


def test_calls_are_those_of_one_checkpoint(worker, tmp_path):
    """Else the faults above would prove less than they say."""
    found = calls("checkpoint", worker, tmp_path / "whole")
    assert found.count(("renameat", 1)) == 1 and ("renameat", 2) not in found
    assert ("fsync", 5) in found and ("fsync", 6) not in found, "three files and two folders"


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_full_disk_ends_the_run_with_a_line_and_it_goes_on(size, small_disk, small_dir, tmp_path):
    words = ["train", "--data-dir", small_dir, "--batch-size", 100, "--epochs", 5, "--wandb", "disabled",
             "--dtype", "float64", "--processes", size]
    done = mnist_dist(*words, "--output-dir", small_disk / "run", cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(set(lines)) == 1 and "No space left on device" in lines[0] and "--resume" in lines[0], lines
    assert not (small_disk / "run" / "result.json").exists()
    warnings = []
    assert load_newest(small_disk / "run" / "checkpoints", warnings.append) and not warnings
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    done = mnist_dist(*words, "--output-dir", small_disk / "run", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "continuing after step" in done.stdout, done.stderr
    alone = mnist_dist(*words, "--output-dir", tmp_path / "alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    for ours, theirs in zip(result_of(small_disk / "run")["epochs"], result_of(tmp_path / "alone")["epochs"],
                            strict=True):
        assert ours["test_nll_sum"] == pytest.approx(theirs["test_nll_sum"], rel=1e-12)
