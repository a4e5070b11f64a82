"""The network interface over which the processes of a run reach each other. Needs no torch.

gloo takes the interface that this machine's name resolves to. On Debian that is the loopback interface, which no other
machine reaches. So gloo is given the interface that routes to the master.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping

from mnist_dist.errors import NotJoined, UserError
from mnist_dist.processes.launch_environment import Launch

VARIABLE = "GLOO_SOCKET_IFNAME"
ELSEWHERE = "192.0.2.1"  # no machine has this address (RFC 5737); the default route leads there


def choose_interface(launch: Launch, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Name gloo the interface that routes to the master, unless the variable is set; returns what it has named.

    On the master itself its name may be a loopback address; then it is the interface of the default route. If all is on
    one machine it is the loopback interface, so that no other machine reaches a port of the run. Raises
    `MnistDistError` if the variable names an interface that is not there.
    """
    if launch.size == 1:
        return None
    if named := environment.get(VARIABLE):
        _check(named, launch)
        return None
    if launch.is_one_machine:
        environment[VARIABLE] = _loopback()
        return None
    places = [launch.master_address]
    if launch.num_machines > 1:
        places.append(ELSEWHERE)
    name_of_interface = next((name for place in places for name in interfaces_to(place)), None)
    if name_of_interface:
        environment[VARIABLE] = name_of_interface
    return name_of_interface


def _loopback() -> str:
    import psutil

    return next((name for name, addresses in psutil.net_if_addrs().items()
                 if "127.0.0.1" in [address.address for address in addresses]), "lo")


def _check(named: str, launch: Launch) -> None:
    import psutil

    there = sorted(psutil.net_if_addrs())
    if missing := [name for name in named.split(",") if name not in there]:
        kind = NotJoined if launch.local_rank == 0 else UserError  # one line per machine
        raise kind(f"{VARIABLE} is {named}, but {socket.gethostname()} has no interface {missing[0]}: name one of "
                   f"{', '.join(there)}, or unset it")


def remedy(launch: Launch, environment: Mapping[str, str] = os.environ) -> str:
    """What to do if the processes of several machines do not reach each other; "" on one machine."""
    if launch.num_machines == 1:
        return ""
    return (f": check that every machine reaches {launch.master_address}, and that {VARIABLE} is on each the network "
            f"interface between them (on {socket.gethostname()} it is {environment.get(VARIABLE, 'not set')})")


def interfaces_to(host: str) -> Iterator[str]:
    """The interfaces that route to the addresses of `host`, without the loopback interface. Sends nothing."""
    import psutil

    try:
        addresses = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)
    except OSError:
        return
    for family, kind, _, _, address in addresses:
        try:
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # chooses a route, and with it this machine's address
                own_address = probe.getsockname()[0].split("%")[0]
        except OSError:
            continue
        if not ipaddress.ip_address(own_address).is_loopback:
            yield from (name for name, its in psutil.net_if_addrs().items()
                        if any(it.family == family and it.address.split("%")[0] == own_address for it in its))
