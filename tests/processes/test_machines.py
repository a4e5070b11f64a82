"""A run on several machines, which are network namespaces here: one result, and whatever goes wrong is said."""

from __future__ import annotations

import re
import sys

import pytest
from hosts import Hosts
from support import result_of

from mnist_dist.cli import run
from mnist_dist.errors import UserError
from mnist_dist.processes.launch import Launch
from mnist_dist.processes.spawn import Machines, read_machines

TRAINING = ["--epochs", "2", "--batch-size", "50", "--wandb", "disabled", "--timeout", "20"]


def outputs_of(started, status=0, timeout=100):
    outputs = [process.communicate(timeout=timeout)[0] for process in started]
    print(*outputs, sep="\n----\n")
    assert [process.returncode for process in started] == [status] * len(started)
    return outputs


def of_ours(number, *words, processes=1, machines=2, address="10.77.0.1"):
    return [sys.executable, "-m", "mnist_dist", "train", "--processes", processes, "--machines", machines,
            "--machine-rank", number - 1, "--address", address, *words]


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


@pytest.mark.long
def test_two_machines(small_dir, tmp_path):
    with Hosts(tmp_path, 2) as hosts:
        started = [hosts.start(number, *of_ours(number, *TRAINING, "--data-dir", small_dir, "--output-dir", "run"))
                   for number in hosts.numbers]
        outputs = outputs_of(started)
    environment = result_of(tmp_path / "run")["environment"]
    assert (environment["num_processes"], environment["num_machines"]) == (2, 2)
    assert "2 machines, over the network interface veth0" in outputs[0] and not outputs[1].strip()
