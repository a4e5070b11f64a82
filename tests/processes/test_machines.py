"""A run on several machines, which are network namespaces here: one result, and whatever goes wrong is said."""

from __future__ import annotations

import re
import sys
import time

import psutil
import pytest
from hosts import Hosts
from support import ROOT, TRAIN, epochs_of, mnist_dist, result_of, write_idx_folder

from mnist_dist.cli import run
from mnist_dist.errors import UserError
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.peer_failure_watch import GRACE_SECONDS
from mnist_dist.processes.spawn import Machines, read_machines
from mnist_dist.record.checkpoint import load_newest

TIMEOUT = 8.0
OPTIONS = ["--batch-size", "50", "--lr", "1e-3", "--timeout", f"{TIMEOUT:g}", "--output-dir", "run"]
ADDRESS = "10.77.0.1"


def ours(number, processes, machines, address):
    return [sys.executable, "-m", "mnist_dist", "train", "--processes", processes, "--machines", machines,
            "--machine-rank", number - 1, "--address", address]


def script(number, processes, machines, address):
    return ["env", f"MACHINES={machines}", f"PROCESSES={processes}", f"ADDRESS={address}",
            ROOT / "launch" / "multi_node.sh", number - 1]


def torchrun(number, processes, machines, address):
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", machines, "--nproc-per-node", processes,
            "--node-rank", number - 1, "--master-addr", address, "--master-port", 29500, TRAIN]


def accelerate(number, processes, machines, address):
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            ROOT / "launch" / "accelerate_multi_node.yaml", "--num_machines", machines, "--num_processes",
            machines * processes, "--machine_rank", number - 1, "--main_process_ip", address, TRAIN]


def torchrun_elastic(number, processes, machines, address):
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", machines, "--nproc-per-node", processes,
            "--max-restarts", 9, "--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"{address}:29500",
            "--rdzv-conf", f"is_host={number == 1},last_call_timeout=2,keep_alive_interval=1", "--local-addr",
            f"10.77.0.{number}", TRAIN]


LAUNCHERS = [ours, script, torchrun, accelerate]


def start(hosts, number, *words, launcher=ours, processes=1, machines=2, address=ADDRESS, **environment):
    return hosts.start(number, *launcher(number, processes, machines, address), *OPTIONS, *words,
                       **{"ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled", **environment})


def ended(started, timeout=200.0):
    """(status, our lines but for those that say for whom it waits, everything) of each, and how long the last took."""
    begin, found = time.monotonic(), []
    for process in started:
        text = process.communicate(timeout=timeout)[0]
        print(text, end="\n----\n")
        found.append((process.returncode, [line for line in text.splitlines() if "mnist-dist: " in line
                                           and " waits for " not in line], text))
    return found, time.monotonic() - begin


@pytest.mark.parametrize(("address", "host", "port"), [
    ("10.0.0.1", "10.0.0.1", 29500), ("node7:1234", "node7", 1234), ("fe80::1", "fe80::1", 29500),
    ("[fe80::1]:77", "fe80::1", 77), ("[fe80::1]", "fe80::1", 29500)])
def test_addresses(address, host, port):
    assert read_machines("3", "2", address) == Machines(3, 2, host, port)


def test_one_machine_needs_no_words():
    assert read_machines(None, None, None) == Machines(1, 0, "localhost", 0)


@pytest.mark.parametrize(("words", "said"), [
    ((None, "0", "a"), "--machines must be a whole number"), (("x", "0", "a"), "got 'x': give the same"),
    (("2", None, "a"), "--machine-rank must be a whole number from 0 to 1"), (("2", "2", "a"), "got '2': give another"),
    (("2", "0", None), "--machines needs --address"), (("2", "0", "a:"), "got 'a:'"), (("2", "0", ":9"), "got ':9'"),
    (("1:2", "0", "a"), "a whole number at least 1, got"), (("0", "0", "a"), "a whole number at least 1"),
    (("2", "0", "a:0"), "a port from 1 to 65535"), (("2", "0", "a:65536"), "got 'a:65536'"),
])
def test_words_that_are_no_machines(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        read_machines(*words)


@pytest.mark.parametrize(("launch", "words", "said"), [
    (Launch(size=4, local_size=2, is_launched=True), ["--processes", "3"], "--processes 3 conflicts with the launcher"),
    (Launch(size=4, local_size=4, is_launched=True), [], "--machines 2 conflicts with the launcher, which runs on 1"),
])
def test_a_launcher_that_says_something_else(launch, words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        run(["train", "--machines", "2", "--machine-rank", "0", "--address", "a", *words], launch)


@pytest.fixture(scope="module")
def alone(small_dir, tmp_path_factory):
    """The same run on one process, in float64."""
    folder = tmp_path_factory.mktemp("alone")
    done = mnist_dist("train", "--data-dir", small_dir, *OPTIONS, "--epochs", 2, "--dtype", "float64", "--wandb",
                      "disabled", cwd=folder)
    assert done.returncode == 0, done.stderr
    return result_of(folder / "run")


# CI tries each launcher once, and one fault of each kind; the others take some minutes more
@pytest.mark.parametrize(("launcher", "processes"), [
    pytest.param(launcher, processes, marks=pytest.mark.long if (launcher, processes) == (ours, 2) else
                 pytest.mark.faults)
    for launcher in LAUNCHERS for processes in (1, 2)])
def test_two_machines_are_one_run(launcher, processes, alone, small_dir, tmp_path):
    folders = [tmp_path / f"machine{number}" for number in (1, 2)]
    with Hosts(tmp_path, 2) as hosts:
        for folder in folders:
            folder.mkdir()
        found, _ = ended([start(hosts, number, "--data-dir", small_dir, "--epochs", 2, "--dtype", "float64", "--wandb",
                                "offline", launcher=launcher, processes=processes, folder=folder, WANDB_MODE="offline")
                          for number, folder in zip(hosts.numbers, folders, strict=True)])
    assert [status for status, *_ in found] == [0, 0] and "over the network interface veth0" in found[0][2]
    result = result_of(folders[0] / "run")
    assert (result["environment"]["num_processes"], result["environment"]["num_machines"]) == (2 * processes, 2)
    for ours, theirs in zip(result["epochs"], alone["epochs"], strict=True):
        assert ours["test_nll"] == pytest.approx(theirs["test_nll"], rel=1e-10)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-10)
    assert len(list((folders[0] / "run" / "wandb").glob("offline-run-*"))) == 1
    assert not list(folders[1].iterdir()), "machine 0 has the one folder of the run"


@pytest.mark.faults
def test_each_machine_fetches_the_data_once(mnist_dir, tmp_path):
    with Hosts(tmp_path, 2) as hosts:
        mirror = hosts.start(1, sys.executable, "-u", "-m", "http.server", 8000, "--directory", mnist_dir)
        found, _ = ended([start(hosts, number, "--dataset", "mnist", "--data-dir", f"data{number}", "--mirror",
                                f"http://{ADDRESS}:8000", "--max-steps", 3, "--timeout", 60, processes=2)
                          for number in hosts.numbers])
        mirror.kill()
        fetched = re.findall(r'^10\.77\.0\.(\d) .*"GET /(\S+) HTTP', mirror.communicate(timeout=20)[0], re.MULTILINE)
    assert [status for status, *_ in found] == [0, 0]
    files = sorted(path.name for path in mnist_dir.glob("*.gz"))
    assert len(files) == 4 and sorted(fetched) == [(str(number), name) for number in hosts.numbers for name in files]


STARTS_BADLY = {  # of a fault: which machines start, with what words, and what each says
    "a machine that does not come": ([1], {}, [], ["machine 1 of 2 did not come within 8 s: start it"]),
    "machine 0 does not come": ([2], {}, [], ["machine2 does not reach machine 0 at 10.77.0.1:29500 within 8 s"]),
    "a wrong address": ([1, 2], {"address": "10.77.0.9"}, [], [
        "machine1 is machine 0, and does not reach itself at 10.77.0.9:29500", "machine2 does not reach machine 0"]),
    "a name without an address": ([1, 2], {"address": "nobody"}, [], [
        f"address nobody does not resolve on machine{number}: --address must be an IP address" for number in (1, 2)]),
    "a loopback address": ([1, 2], {"address": "127.0.0.1"}, [], [
        "machine 1 of 2 did not come", "127.0.0.1 is a loopback address on machine2, which is another machine"]),
    "another option": ([1, 2], {}, ["--seed", "{number}"], ["--seed is 1 on machine1 and 2 on machine2"] * 2),
    "other data": ([1, 2], {}, ["--data-dir", "data{number}"], [" on machine1 and "] * 2),
    "no data": ([1, 2], {}, ["--dataset", "mnist", "--data-dir", "no{number}"], [
        "on machine1: --data-dir no1 does not exist, and train-images-idx3-ubyte.gz could not be downloaded ("] * 2),
}


@pytest.mark.parametrize("fault", [
    pytest.param(fault, marks=pytest.mark.long if fault in ("no data", "another option")
                 else pytest.mark.faults) for fault in STARTS_BADLY])
def test_a_bad_start_is_said_on_every_machine(fault, small_dir, tmp_path):
    numbers, options, words, said = STARTS_BADLY[fault]
    for number in (1, 2):
        write_idx_folder(tmp_path / f"data{number}", 1009, 210 + number)
    with Hosts(tmp_path, 2) as hosts:
        found, seconds = ended([start(hosts, number, "--data-dir", small_dir,
                                      *(word.format(number=number) for word in words), **options)
                                for number in numbers])
    for (status, lines, _), needle in zip(found, said, strict=True):
        assert status == 2 and len(lines) == 1 and needle in lines[0], lines
    # starting Python on a busy machine takes its time, and importing torchvision, for a download, as much again
    assert seconds < TIMEOUT + (60 if fault == "no data" else 25)
    assert not (tmp_path / "run").exists()


def rank_of(started):
    """The process of the run that this command has started."""
    (found,) = (process for process in psutil.Process(started.pid).children(recursive=True)
                if process.environ().get("RANK") and not process.children())
    return found


@pytest.mark.parametrize(("launcher", "fault"), [
    pytest.param(launcher, fault, marks=pytest.mark.long if (launcher, fault) == (ours, "cut") else
                 pytest.mark.faults)
    for launcher in (ours, torchrun, accelerate) for fault in ("cut", "crash of 1", "crash of 2", "stop of 1",
                                                               "stop of 2")
    if launcher is ours or "stop" not in fault])  # of theirs, the one on the same machine waits for ever
def test_a_machine_that_is_lost_ends_the_others(fault, launcher, small_dir, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    with Hosts(tmp_path, 2) as hosts:
        started = [start(hosts, number, "--data-dir", small_dir, "--epochs", 100_000, "--checkpoint-every", "5steps",
                         "--reproducible", launcher=launcher) for number in hosts.numbers]
        until = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < until and all(process.poll() is None for process in started)
            time.sleep(0.05)
        if fault == "cut":
            hosts.cut(2)
        elif "crash" in fault:
            started[int(fault[-1]) - 1].kill()
        else:
            rank_of(started[int(fault[-1]) - 1]).suspend()
        found, seconds = ended(started)
    print(f"{fault}: all have ended after {seconds:.1f} s")
    for number, (status, lines, _) in enumerate(found, 1):
        if fault == f"stop of {number}":
            assert status == 1
            assert f"the processes on machine{number} did not end by themselves (stopped)" in lines[-1]
        if not fault.endswith(f" of {number}"):
            assert status == 1 and len(lines) == 1, lines
            other = f"process {2 - number} of 2 on machine{3 - number}"
            assert f"process {number - 1} lost {other} after step " in lines[0]
    assert seconds < TIMEOUT + GRACE_SECONDS, "nobody waits as long as for a process that writes a checkpoint"
    assert load_newest(tmp_path / "run" / "checkpoints", pytest.fail) is not None
    done = mnist_dist("train", "--data-dir", small_dir, *OPTIONS, "--resume", "--reproducible", "--epochs", 100_000,
                      "--max-steps", 1, "--wandb", "disabled", "--checkpoint-every", "5steps", cwd=tmp_path)
    assert done.returncode == 0 and "continuing after step" in done.stdout, done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("attempt", range(10))
def test_a_machine_goes_and_comes_back(attempt, small_dir, tmp_path):
    """The other goes on from the newest checkpoint, takes it in, and the run has the bits of the run left alone."""
    words = ["--data-dir", small_dir, "--epochs", 30, "--reproducible", "--checkpoint-every", "1epoch", "--resume",
             "--batch-size", 10]
    alone = mnist_dist("train", *OPTIONS[:-1], "alone", *words, "--wandb", "disabled", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    run = tmp_path / "run"

    def wait_for(number):
        until = time.monotonic() + 90
        while epochs_of(run) < number:
            assert time.monotonic() < until and first.poll() is None
            time.sleep(0.05)

    with Hosts(tmp_path, 2) as hosts:
        how = {"launcher": torchrun_elastic, "machines": "1:2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        first, second = (start(hosts, number, *words, **how) for number in hosts.numbers)
        wait_for(2)
        second.kill()
        wait_for(epochs_of(run) + 3)
        second = start(hosts, 2, *words, **how)
        found, _ = ended([first, second])
    assert [status for status, *_ in found] == [0, 0]
    assert found[0][2].count("2 machines, over the network interface") == 2, "at the start, and when it is back"
    for name in ("run", "alone"):
        result_of(tmp_path / name)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "alone"))
    assert ours == theirs and epochs_of(run) == 30
