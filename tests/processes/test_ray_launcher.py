"""A run on a Ray cluster: the same bits and lines, whatever is lost; what will not go away is not tried again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from support import ROOT, assert_one_line_error, epochs_of, mnist_dist_launched, result_of, run_here

from mnist_dist import runner
from mnist_dist.processes import ray_launcher
from mnist_dist.record.checkpoint import load_newest

OPTIONS = ["--reproducible", "--batch-size", 10, "--checkpoint-every", "20steps", "--resume", "--wandb", "disabled"]
FEW_EPOCHS, EPOCHS, MANY_EPOCHS = 10, 40, 100  # many: until Ray has noticed that a node is back


class Cluster:
    """Two nodes of one core each, and what is started on them."""

    def __init__(self):
        pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, runner.MARK: self.mark, "PYTHONPATH": str(ROOT)}
        self.process = self.popen(ROOT / "tests" / "helpers" / "ray_cluster.py")
        self.address = self.process.stdout.readline().strip()

    def popen(self, *words, **environment):
        return subprocess.Popen([sys.executable, *map(str, words)], env={**self.environment, **environment}, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                start_new_session=True)

    def do(self, word):
        """Carry out `remove`, `add` or `wait`."""
        print(word, file=self.process.stdin, flush=True)
        assert "done\n" in iter(self.process.stdout.readline, ""), "Ray itself writes lines there too"

    def train(self, folder, *words, processes=2):
        """The driver of a run there."""
        return self.popen("-m", "mnist_dist", "train", "--launcher", "ray", "--processes", processes, *OPTIONS, *words,
                          "--output-dir", folder, RAY_ADDRESS=self.address)

    def ranks(self):
        """The processes of a run, by rank."""
        found = {}
        for process in runner.tree(self.mark):
            try:
                if "mnist_dist" in process.cmdline() and (rank := process.environ().get("RANK")):
                    found[int(rank)] = process
            except psutil.Error:
                continue
        return found

    def end(self):
        runner.end_tree(self.mark)
        self.process.communicate()


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    yield cluster
    cluster.end()


def wait_for(driver, folder, number, deadline=200.0):
    """Until so many epochs are done."""
    until = time.monotonic() + deadline
    while epochs_of(folder) < number:
        assert driver.poll() is None and time.monotonic() < until, driver.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize(("words", "said"), [
    (["--processes", "2"], "--launcher ray needs --output-dir"),
    (["--processes", "2:1", "--output-dir", "run"], "--processes must be a whole number at least 1, or LEAST:MOST"),
    (["--processes", "2", "--output-dir", "run", "--machines", "2"], "--launcher ray has the cluster's machines"),
    (["--processes", "1:3", "--resume", "--output-dir", "run", "--batch-size", "2"], "--batch-size 2 is smaller than"),
    (["--processes", "1:2", "--output-dir", "run"], "--max-restarts and LEAST:MOST processes on Ray need --resume"),
    (["--max-restarts", "3", "--output-dir", "run"], "--max-restarts and LEAST:MOST processes on Ray need --resume"),
    (["--max-restarts", "x", "--output-dir", "run"], "--max-restarts must be a whole number at least 0, got 'x'"),
])
def test_what_is_wrong_is_said_before_ray_starts(words, said, capsys):
    assert run_here(["train", "--launcher=ray", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_ray(tmp_path):
    """Here a module of Ray's name that does not import."""
    (tmp_path / "ray.py").write_text("raise ImportError")
    done = mnist_dist_launched("train", "--launcher", "ray", "--output-dir", "run", cwd=tmp_path,
                               PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert_one_line_error(done, "--launcher ray needs Ray: pip install -e '.[ray]'")


def test_rays_page_about_a_lost_node_is_one_line(monkeypatch, capsys):
    worker = pytest.importorskip("ray._private.worker", reason="needs Ray: pip install -e '.[ray]'")
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    ray_launcher._shorten()
    for number in (1, 1, 2):
        page = f"Raylet {number} is terminated. Termination is unexpected.\n    [state-dump] NodeManager: 5 total\n"
        worker.print_to_stdstream({"lines": [page], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert capsys.readouterr().err == "".join(f"mnist-dist: Ray says: Raylet {n} is terminated\n" for n in (1, 2))


FAULTS = {"none": 1, "process 0": 1, "process 1": 1, "worker": 10, "node": 10, "node and back": 1}  # and how often


@pytest.mark.parametrize(("fault", "attempt"), [
    pytest.param(fault, attempt, marks=pytest.mark.long if fault == "process 1" else pytest.mark.faults)
    for fault, times in FAULTS.items() for attempt in range(times)])
def test_a_run_on_two_nodes_has_the_same_bits(fault, attempt, cluster, alone, small_dir, tmp_path):
    """At a random moment of the run. Seconds that each takes: ./launch/test.sh -m faults -n 0 -s -k two_nodes"""
    cluster.do("wait")
    run, epochs = tmp_path / "run", (
        MANY_EPOCHS if "back" in fault else FEW_EPOCHS if fault.startswith("process") else EPOCHS)
    moment, begin = random.Random(f"{fault} {attempt}"), time.monotonic()
    driver = cluster.train(run, "--epochs", epochs, "--max-restarts", 3, "--data-dir", small_dir,
                           processes="1:2" if "node" in fault else 2)
    wait_for(driver, run, moment.randint(1, min(epochs, EPOCHS) // 2))
    time.sleep(moment.uniform(0, 0.1))
    while sorted(cluster.ranks()) != [0, 1]:  # Ray may begin with one, and take the other soon
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)
    if fault.startswith("process"):
        cluster.ranks()[int(fault[-1])].kill()
    elif fault == "worker":
        cluster.ranks()[1].parent().kill()
    elif fault.startswith("node"):
        cluster.do("remove")
        if "back" in fault:
            wait_for(driver, run, epochs_of(run) + 2)
            cluster.do("add")
    printed, errors = driver.communicate(timeout=400)
    print(f"{printed}{errors}{fault}: {time.monotonic() - begin:.1f} s in all")
    if fault == "node":
        cluster.do("add")
    assert driver.returncode == 0, errors
    result_of(run)
    assert (run / "model.safetensors").read_bytes() == alone(epochs) and epochs_of(run) == epochs
    assert printed.count("2 processes on") >= (1 if fault in ("none", "node") else 2)
    assert "Traceback" not in errors and cluster.ranks() == {}
    assert "state-dump" not in printed + errors, "Ray's page about a node that is lost is one line"


@pytest.mark.parametrize(("what", "words", "status", "said"), [
    pytest.param("diverged", ["--lr", "1e30"], 3, "training diverged: the loss is nan", marks=pytest.mark.faults),
    pytest.param("full disk", ["--checkpoint-every", "1epoch", "--dtype", "float64"], 1, "No space left on device",
                 marks=pytest.mark.faults),
    pytest.param("no data", ["--data-dir", "nowhere", "--dataset", "mnist", "--mirror", "http://127.0.0.1:9/"], 2,
                 "127.0.0.1:9", marks=pytest.mark.faults)])
def test_what_will_not_go_away_is_tried_once(what, words, status, said, cluster, small_disk, small_dir, tmp_path):
    run = (small_disk if what == "full disk" else tmp_path) / "run"
    words = [tmp_path / word if word == "nowhere" else word for word in words]
    driver = cluster.train(run, "--epochs", 9, "--max-restarts", 3, "--data-dir", small_dir, *words)
    printed, errors = driver.communicate(timeout=200)
    assert driver.returncode == status and printed.count("2 processes on") == (what != "no data"), errors
    assert [line for line in errors.splitlines() if "error: " in line] == errors.splitlines()
    assert errors.count("mnist-dist: error: ") == 1 and said in errors and cluster.ranks() == {}


@pytest.mark.faults
def test_a_node_that_does_not_see_the_folder_is_named(cluster, small_dir, tmp_path):
    """Its own file system is mounted over it."""
    hidden = tmp_path / "shared"
    hidden.mkdir()
    inside = 'mount -t tmpfs none "$1" && exec ray start --address="$2" --num-cpus=0 --block'
    code = "import os, sys; os.execvp('unshare', ['unshare', '--mount', 'sh', '-c', *sys.argv[1:]])"
    blind = cluster.popen("-c", code, inside, "sh", hidden, cluster.address,
                          PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    until = time.monotonic() + 60
    while "Ray runtime started" not in blind.stdout.readline():
        assert blind.poll() is None and time.monotonic() < until, blind.communicate()
    driver = cluster.train(hidden / "run", "--epochs", 1, "--data-dir", small_dir)
    _, errors = driver.communicate(timeout=200)
    blind.terminate()
    blind.communicate(timeout=30)
    assert driver.returncode == 2 and f"does not see {hidden / 'run'}: give an --output-dir on a file system" in errors


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint(number, cluster, small_dir, tmp_path):
    run = tmp_path / "run"
    driver = cluster.train(run, "--epochs", 10_000, "--data-dir", small_dir)
    wait_for(driver, run, 2)
    driver.send_signal(number)
    _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 128 + number, errors
    assert f"stopped by {number.name} after step" in errors and load_newest(run / "checkpoints", print) is not None
    assert cluster.ranks() == {}


@pytest.mark.faults
def test_a_cluster_that_is_too_small_and_one_that_is_not_there(cluster, small_dir, tmp_path):
    driver = cluster.train(tmp_path / "run", "--data-dir", small_dir, processes=3)
    _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 2 and "3 processes need 3 CPUs, and Ray's cluster has 2" in errors
    done = mnist_dist_launched("train", "--launcher", "ray", "--output-dir", "run", cwd=tmp_path,
                               RAY_ADDRESS="127.0.0.1:9")
    assert_one_line_error(done, "Ray's cluster at 127.0.0.1:9 is not reached")
