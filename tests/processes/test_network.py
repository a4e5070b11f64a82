"""The interface between machines: found by the route to the master, also if the machines' names are loopback ones.

Two machines are two network namespaces, which needs root.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support import ROOT, TRAIN, result_of

from mnist_dist.processes.launch import Launch
from mnist_dist.processes.network import VARIABLE, choose_interface, interfaces_to


def launch_to(address, **others):
    return Launch(**{"size": 2, "local_size": 1, "is_launched": True, "master_address": address, **others})


def own_interfaces():
    """Those of this machine that have an address which is no loopback address."""
    return {name: one.address for name, its in psutil.net_if_addrs().items() for one in its
            if one.family == socket.AF_INET and not one.address.startswith("127.")}


def test_a_loopback_address_is_no_interface():
    assert list(interfaces_to("127.0.0.1")) == list(interfaces_to("no-such-host.invalid")) == []
    for name, address in own_interfaces().items():
        assert name in interfaces_to(address), "the master's own address is on its interface"


def test_what_is_set_and_what_is_on_one_machine_is_left_alone():
    environment = {VARIABLE: "eth7"}
    assert choose_interface(launch_to("10.1.2.3"), environment) is None and environment == {VARIABLE: "eth7"}
    environment = {}
    assert choose_interface(launch_to("localhost", local_size=2), environment) is None
    assert choose_interface(Launch(), environment) is None and environment == {}
    for name, address in own_interfaces().items():
        assert choose_interface(launch_to(address), environment) == name == environment.pop(VARIABLE)


@pytest.fixture
def machines(tmp_path):
    """Runs a command on machine 1 or 2, whose names are loopback addresses on themselves, as Debian has it."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("two network namespaces need root and `ip` (apt-get install iproute2)")
    names = [f"mnist-dist-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*words):
        subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "route", "add", "default", "dev", "veth0")
            other = 3 - number
            hosts = Path("/etc/netns", name, "hosts")
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 machine{number}\n10.77.0.{other} machine{other}\n")

        def start(number, *command, **environment):
            inside = f"hostname machine{number}; exec \"$@\""
            return subprocess.Popen(
                ["ip", "netns", "exec", names[number - 1], "unshare", "--uts", "--pid", "--fork", "--kill-child",
                 "sh", "-c", inside, "sh", *map(str, command)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})

        yield start
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


@pytest.mark.long
@pytest.mark.parametrize("master", ["10.77.0.1", "machine1"])
def test_two_machines_whose_names_are_loopback_addresses(master, machines, small_dir, tmp_path):
    """`machine1` is 127.0.1.1 on machine 1 itself, and the right address on machine 2."""
    started = [machines(number, sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1,
                        "--node-rank", number - 1, "--master-addr", master, "--master-port", 29555, TRAIN,
                        "--data-dir", small_dir, "--max-steps", 3, "--wandb", "disabled", "--timeout", 20,
                        "--output-dir", "run") for number in (1, 2)]
    outputs = [process.communicate(timeout=100)[0] for process in started]
    print(*outputs, sep="\n----\n")
    assert [process.returncode for process in started] == [0, 0]
    environment = result_of(tmp_path / "run")["environment"]
    assert (environment["num_processes"], environment["num_machines"]) == (2, 2)
    assert "2 machines, over the network interface veth0: GLOO_SOCKET_IFNAME names another" in outputs[0]
