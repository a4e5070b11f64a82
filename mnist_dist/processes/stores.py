"""The store in which the processes of a run, or its machines, meet: on machine 0, over TCP.

A store whose machine is lost blocks whoever asks it, so every question has a time limit.
"""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from mnist_dist.errors import UserError
from mnist_dist.output import say
from mnist_dist.processes.addresses import addresses_of, is_loopback
from mnist_dist.processes.launch_environment import BEGUN
from mnist_dist.text import cause, first_line
from mnist_dist.worker import within

ASK_SECONDS = 10.0  # for the store's answer
NAME_SECONDS = 10.0  # for a name to resolve: on a cluster it may come a little after the machine
LOOPBACK = "127.0.0.1"
NOTICE_SECONDS = 5.0  # after the command's begin: a line says for whom it waits


class Wait:
    """A wait of at most `limit_s` seconds. A line on standard error says for whom it waits, 5 s after the command's
    begin and after 1 s of waiting; none if `for_whom` is "".

    `why` says what makes this process wait, if a person may not know: variables that an earlier command has left.
    """

    def __init__(self, limit_s: float, for_whom: Callable[[], str], why: str = "") -> None:
        self.limit_s, self.for_whom, self.why = limit_s, for_whom, why
        self._begin, self._is_said = time.monotonic(), limit_s <= NOTICE_SECONDS
        self.notice_s = max(1.0, NOTICE_SECONDS - (self._begin - BEGUN))

    def is_over(self) -> bool:
        """Whether the time is over."""
        waited = time.monotonic() - self._begin
        if waited > self.notice_s and not self._is_said:
            self._is_said = True
            if whom := self.for_whom():
                because = f" ({self.why} say so: unset these to run one process)" if self.why else ""
                say(f"mnist-dist: {platform.node()} waits for {whom}, for {self.limit_s:g} s at most{because}",
                    is_error=True)
        return waited > self.limit_s

    @property
    def rest_s(self) -> float:
        """Seconds that are left."""
        return self._begin + self.limit_s - time.monotonic()


def store_at(address: str, port: int, *, setting: str, hosts_it: bool, is_elsewhere: bool, timeout_s: float,
             why: str = "") -> Any:
    """The store at machine 0, made by this process or found. Raises `UserError`. `why`: as in `Wait`.

    `is_elsewhere`: machine 0 is another machine than this one, so that its address cannot be a loopback one. `setting`
    is the option or variable by which a user gives the address.
    """
    from torch.distributed import TCPStore

    def make() -> Any:
        if hosts_it and address == LOOPBACK:
            return _store_on_loopback(port, timeout_s)
        return TCPStore("localhost" if hosts_it else address, port, is_master=hosts_it, multi_tenant=True,
                        timeout=timedelta(seconds=timeout_s), wait_for_workers=False)

    if not hosts_it:
        reach(address, port, setting=setting, is_elsewhere=is_elsewhere, timeout_s=timeout_s, why=why)
    try:
        # with our own look at the port first: torch prints a page about a port that does not answer
        store = within(ASK_SECONDS, make)
        if hosts_it and port and address != LOOPBACK:
            _resolved(address, setting, why)
            _wait_for_port(address, port, ASK_SECONDS, why)
        return store
    except (RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(f"port {port} is in use on {platform.node()}: give another one, the same on every machine"
                            ) from None
        reason = first_line(error)
        if hosts_it:
            raise UserError(f"{platform.node()} is machine 0, and does not reach itself at {address}:{port} "
                            f"({reason}): {setting} must be an address of {platform.node()}") from None
        raise UserError(f"{platform.node()} has no store at {address}:{port} ({reason}): is it another program's port?"
                        ) from None


def local_store(timeout_s: float) -> Any:
    """A store for the processes of this machine alone, at a free port of the loopback interface. Raises `OSError`.

    A launcher of torch's in this process that makes a store at that port shares this one's: torch keeps one for each
    port (`multi_tenant`). It would listen on every interface.
    """
    return _store_on_loopback(0, timeout_s)


def _store_on_loopback(port: int, timeout_s: float) -> Any:
    """A store that listens at this port of the loopback interface, or at a free one for 0. Raises `OSError`."""
    from torch.distributed import TCPStore

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(1024)
        port = listener.getsockname()[1]
    except OSError:
        listener.close()
        raise
    return TCPStore(LOOPBACK, port, is_master=True, timeout=timedelta(seconds=timeout_s), multi_tenant=True,
                    wait_for_workers=False, master_listen_fd=listener.detach())


def reach(address: str, port: int, *, setting: str, is_elsewhere: bool, timeout_s: float, why: str = "") -> None:
    """Wait until machine 0 takes a connection there. Raises `UserError` after the time limit. `setting`: as above."""
    if is_loopback(_resolved(address, setting, why)) and is_elsewhere:
        raise UserError(f"machine 0's address {address} is a loopback address on {platform.node()}, which is another "
                        f"machine: {setting} must be an address that every machine reaches")
    try:
        _wait_for_port(address, port, timeout_s, why)
    except OSError as error:
        raise UserError(f"{platform.node()} does not reach machine 0 at {address}:{port} within {timeout_s:g} s "
                        f"({cause(error)}): start the run there too, check {setting}, and that the port is open"
                        ) from None


def _wait_for_port(address: str, port: int, timeout_s: float, why: str) -> None:
    """Wait until it takes a connection. Raises `OSError`, the last one, after the time limit."""
    wait = Wait(timeout_s, lambda: f"machine 0 at {address}:{port}", why)
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(5.0, wait.rest_s))).close()
            return
        except OSError:
            if wait.is_over():
                raise
            time.sleep(0.2)


def _resolved(address: str, setting: str, why: str) -> list[str]:
    wait = Wait(NAME_SECONDS, lambda: f"the address of machine 0, {address}", why)
    while not (addresses := addresses_of(address)):
        if wait.is_over():
            raise UserError(f"machine 0's address {address} does not resolve on {platform.node()}: {setting} must be "
                            "an IP address, or a name that every machine knows")
        time.sleep(0.5)
    return addresses
