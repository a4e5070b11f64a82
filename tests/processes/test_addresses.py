"""Where machines are: names that resolve or do not, and SLURM's lists of nodes."""

from __future__ import annotations

import os
import socket

import pytest

from mnist_dist.processes import addresses
from mnist_dist.processes.addresses import address_in_slurm, addresses_of, first_host, is_loopback, tasks_per_node


@pytest.fixture
def resolve(tmp_path, monkeypatch):
    """Names resolve as these do, and scontrol knows these nodes."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(names, scontrol="exit 1"):
        def getaddrinfo(host, *_, **__):
            if host not in names:
                raise socket.gaierror(-2, "Name or service not known")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names[host], 0))]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        (tmp_path / "scontrol").write_text(f"#!/usr/bin/env bash\n{scontrol}\n")
        (tmp_path / "scontrol").chmod(0o755)

    return make


KNOWS = "[ \"$*\" = '--oneliner show node n1' ] && echo 'NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1'"


@pytest.mark.parametrize(("names", "scontrol", "is_elsewhere", "address"), [
    ({"n1": "10.0.0.7"}, KNOWS, True, "n1"),  # the name resolves: SLURM is not asked
    ({"n1": "127.0.1.1"}, KNOWS, False, "n1"),  # a node's name on itself, as Debian has it
    ({"n1": "127.0.1.1"}, KNOWS, True, "10.0.0.1"),
    ({}, KNOWS, True, "10.0.0.1"),
    ({}, KNOWS, False, "10.0.0.1"),
    ({}, "exit 1", True, "n1"),  # the controller does not answer
    ({}, "echo 'NodeName=n1'", True, "n1"),
])
def test_a_node_in_slurm(names, scontrol, is_elsewhere, address, resolve):
    resolve(names, scontrol)
    assert address_in_slurm("n1", is_elsewhere=is_elsewhere) == address


def test_a_controller_that_is_slow_or_not_there(resolve, monkeypatch):
    resolve({}, "sleep 5")
    monkeypatch.setattr(addresses, "SLURM_SECONDS", 0.1)
    assert address_in_slurm("n1", is_elsewhere=True) == "n1"
    monkeypatch.setenv("PATH", "/nonexistent")
    assert address_in_slurm("n1", is_elsewhere=True) == "n1"


def test_addresses():
    assert addresses_of("127.0.0.1") == ["127.0.0.1"] and addresses_of("no such\x00host" + 70 * "x") == []
    assert is_loopback(["127.0.1.1", "::1"]) and not is_loopback(["127.0.1.1", "10.0.0.1"])


@pytest.mark.parametrize(("text", "tasks"), [
    ("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1,2", [1, 2]), ("", [1]), ("8(x2)", [8, 8]),
])
def test_tasks_per_node(text, tasks):
    assert tasks_per_node(text) == tasks


@pytest.mark.parametrize(("nodes", "host"), [
    ("n1", "n1"), ("n1,n2", "n1"), ("gpu[07-09,12],login", "gpu07"), ("a[3,5]-ib,b", "a3-ib"), ("r1c[2-4]", "r1c2"),
    ("node-1.example.org", "node-1.example.org"),
])
def test_the_first_host(nodes, host):
    assert first_host(nodes) == host
