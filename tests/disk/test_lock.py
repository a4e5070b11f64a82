"""One run in a folder: the second start is refused, a dead one is no obstacle, a folder that moves ends the run."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import assert_one_line_error, epochs_of, mnist_dist, result_of

from mnist_dist.disk.lock import FolderLock, Held
from mnist_dist.errors import MnistDistError

ENDLESS = ["--epochs", 100_000, "--batch-size", 2, "--compile", "off", "--wandb", "disabled", "--output-dir",
           "run"]


def hold(folder, ready):
    FolderLock(folder).acquire()
    ready.set()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_the_holder_is_named_and_its_death_frees_the_lock(holder, tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(Held, match=f"^process {holder.pid} on {platform.node()}$"):
        lock.acquire()
    lock.release()
    threading.Timer(0.5, holder.kill).start()
    lock.acquire(wait_s=30)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time(tmp_path):
    """Locks that are removed when they are given back exclude each other all the same."""
    inside, most, taken = [], [], []

    def work(number):
        lock = FolderLock(tmp_path)
        for _ in range(20):
            lock.acquire(wait_s=60)
            inside.append(number)
            most.append(len(inside))
            taken.append(number)
            inside.remove(number)
            lock.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert max(most) == 1 and len(taken) == 80


@pytest.mark.parametrize("change", ["renamed", "removed", "replaced"])
def test_a_folder_that_is_another_one_is_noticed(change, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    lock.check()
    lock.acquire()
    lock.check()
    folder.rename(tmp_path / "moved")
    if change == "replaced":
        folder.mkdir()
        (folder / ".lock").write_text("of another")
    with pytest.raises(MnistDistError, match="was renamed or removed"):
        lock.check()
    lock.release()
    assert (tmp_path / "moved" / ".lock").exists() and (folder.exists() == (change == "replaced"))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_not_a_file_is_not_locked(kind, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / ".lock"
    {"link": lambda: path.symlink_to(outside), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(OSError):
        FolderLock(tmp_path / "run").acquire()
    assert outside.read_text() == "precious"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fail)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert not lock.is_locked, "the run says so"
    lock.check()
    lock.release()


class Going:
    """A run that goes on until it is ended, in a thread of this process that waits for it."""

    def __init__(self, small_dir, folder, size):
        self.folder, self.done = folder / "run", []
        words = ["train", "--data-dir", small_dir, "--processes", size, *ENDLESS]
        self.thread = threading.Thread(target=lambda: self.done.append(mnist_dist(*words, cwd=folder, timeout=100)))
        self.thread.start()
        until = time.monotonic() + 60
        while epochs_of(self.folder) == 0:
            assert time.monotonic() < until and not self.done, self.done
            time.sleep(0.02)
        self.pid = int((self.folder / ".lock").read_text().split()[1])

    def ended(self):
        """How it ended."""
        self.thread.join()
        return self.done[0]


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_second_start_is_refused(size, small_dir, tmp_path):
    going = Going(small_dir, tmp_path, size)
    try:
        for more in ([], ["--resume"]):
            second = mnist_dist("train", "--data-dir", small_dir, "--processes", size, *ENDLESS, *more, cwd=tmp_path)
            assert_one_line_error(second, f"in use by process {going.pid} on {platform.node()}", "--output-dir run")
    finally:
        os.kill(going.pid, signal.SIGTERM)
    assert going.ended().returncode == 143
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(len(lines)))
    assert not (tmp_path / "run" / ".lock").exists()
    epochs = len(lines) + 1
    done = mnist_dist("train", "--resume", "--output-dir", "run", "--epochs", epochs, cwd=tmp_path)
    assert done.returncode == 0 and len(result_of(tmp_path / "run")["epochs"]) == epochs, done.stderr


@pytest.mark.parametrize(("size", "change"), [
    (1, "renamed"), pytest.param(2, "renamed", marks=pytest.mark.long), (1, "removed")])
def test_a_folder_that_moves_ends_the_run(size, change, small_dir, tmp_path):
    """It does not become a second folder."""
    going = Going(small_dir, tmp_path, size)
    going.folder.rename(tmp_path / "moved")
    if change == "removed":
        shutil.rmtree(tmp_path / "moved")
    done = going.ended()
    assert_one_line_error(done, "run was renamed or removed", "--resume", status=1)
    assert [path.name for path in tmp_path.iterdir()] == (["moved"] if change == "renamed" else [])


@pytest.mark.faults
@pytest.mark.parametrize(("size", "resumes"), [(1, False), (2, False), (1, True), (2, True)])
def test_two_starts_at_once(size, resumes, small_dir, tmp_path):
    """50 times in all with the four cases: one of them makes the record, and the other one leaves nothing."""
    for turn in range(13 if size == 1 else 12):
        words = ["train", "--data-dir", small_dir, "--processes", size, "--output-dir", f"run-{turn}", "--batch-size",
                 50, "--wandb", "disabled"]
        if resumes:
            assert mnist_dist(*words, "--epochs", 1, cwd=tmp_path).returncode == 0
            words.append("--resume")
        with ThreadPoolExecutor(2) as pool:
            starts = list(pool.map(lambda _, words=words: mnist_dist(*words, "--epochs", 12, cwd=tmp_path), range(2)))
        statuses = sorted(done.returncode for done in starts)
        assert statuses == [0, 2] or (resumes and statuses == [0, 0]), [done.stderr for done in starts]
        for done in starts:
            if done.returncode:
                assert_one_line_error(done, "run-")
        folder = tmp_path / f"run-{turn}"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert lines == result_of(folder)["epochs"] and [line["epoch"] for line in lines] == list(range(12))
