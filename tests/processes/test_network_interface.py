"""The interface between machines: found by the route to the master, also if the machines' names are loopback ones.

Two machines are two network namespaces, which needs root.
"""

from __future__ import annotations

import socket
import sys

import psutil
import pytest
from hosts import Hosts
from support import TRAIN, result_of

from mnist_dist.errors import NotJoined
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.network_interface import VARIABLE, choose_interface, interfaces_to, remedy


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
    environment = {VARIABLE: "lo"}
    assert choose_interface(launch_to("10.1.2.3"), environment) is None and environment == {VARIABLE: "lo"}
    environment = {}
    assert choose_interface(launch_to("localhost", local_size=2), environment) is None
    assert choose_interface(Launch(), environment) is None and environment == {}
    for name, address in own_interfaces().items():
        assert choose_interface(launch_to(address), environment) == name == environment.pop(VARIABLE)


def test_an_interface_that_is_not_there():
    with pytest.raises(NotJoined, match=r"GLOO_SOCKET_IFNAME is lo,eth77, but .* has no interface eth77: name one of"):
        choose_interface(launch_to("10.1.2.3"), {VARIABLE: "lo,eth77"})
    assert remedy(launch_to("10.1.2.3", local_size=2)) == ""
    assert "that GLOO_SOCKET_IFNAME is on each the network interface between them" in (
        said := remedy(launch_to("10.1.2.3"), {VARIABLE: "lo"})) and said.endswith("it is lo)")


@pytest.mark.parametrize("master", [pytest.param("10.77.0.1", marks=pytest.mark.faults),
                                    pytest.param("machine1", marks=pytest.mark.faults)])
def test_two_machines_whose_names_are_loopback_addresses(master, small_dir, tmp_path):
    """`machine1` is 127.0.1.1 on machine 1 itself, and the right address on machine 2."""
    with Hosts(tmp_path, 2) as hosts:
        started = [hosts.start(number, sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node",
                               1, "--node-rank", number - 1, "--master-addr", master, "--master-port", 29555, TRAIN,
                               "--data-dir", small_dir, "--max-steps", 3, "--wandb", "disabled", "--timeout", 20,
                               "--output-dir", "run") for number in hosts.numbers]
        outputs = [process.communicate(timeout=200)[0] for process in started]
    print(*outputs, sep="\n----\n")
    assert [process.returncode for process in started] == [0, 0]
    environment = result_of(tmp_path / "run")["environment"]
    assert (environment["num_processes"], environment["num_machines"]) == (2, 2)
    assert "2 machines, over the network interface veth0: GLOO_SOCKET_IFNAME names another" in outputs[0]
