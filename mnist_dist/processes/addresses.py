"""Where machines are: names, IP addresses, and SLURM's lists of nodes. Needs no torch."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Sequence

SLURM_SECONDS = 20.0  # for the controller's answer


def addresses_of(host: str) -> list[str]:
    """The IP addresses of a host's name; of an IP address, itself. Empty if the name does not resolve."""
    try:
        return [str(place[4][0]) for place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):  # UnicodeError: of a name that cannot be one
        return []


def is_loopback(addresses: Sequence[str]) -> bool:
    """Whether all of these are loopback addresses."""
    return all(address.startswith("127.") or address == "::1" for address in addresses)


def address_in_slurm(host: str, *, is_elsewhere: bool) -> str:
    """What leads to a node: its name, or the address that SLURM has for it if the name does not resolve, or if it
    resolves to a loopback address on another node.
    """
    addresses = addresses_of(host)
    if addresses and not (is_elsewhere and is_loopback(addresses)):
        return host
    try:
        shown = subprocess.run(["scontrol", "--oneliner", "show", "node", host], stdin=subprocess.DEVNULL, text=True,
                               capture_output=True, timeout=SLURM_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return host
    address = re.search(r"\bNodeAddr=(\S+)", shown)
    return address[1] if address else host


def tasks_per_node(text: str) -> list[int]:
    """SLURM's list of tasks on each node: `2(x3),1` is [2, 2, 2, 1]."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in pairs for _ in range(int(times or 1))] or [1]


def first_host(nodes: str) -> str:
    """The first host of SLURM's list of nodes: `gpu[07-09,12],login` has gpu07 first."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else "localhost"
