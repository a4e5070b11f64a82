"""Machines for tests: network namespaces on this one, each with a name, an address and processes.

    with Hosts(tmp_path, 2) as hosts:
        started = [hosts.start(number, "python", …) for number in hosts.numbers]

Host N is `machineN`, 10.77.0.N, in a namespace of its own; a switch joins all. On itself its name is 127.0.1.1, as
Debian has it. Needs root and `ip`. What was started, and the namespaces, are gone at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

LINK = "veth0"  # of each host to the switch


class Hosts:
    """So many hosts, from `with` on. The test is skipped if they cannot be made here."""

    def __init__(self, folder: Path, number: int) -> None:
        if os.geteuid() or not shutil.which("ip"):
            pytest.skip("network namespaces need root and `ip` (apt-get install iproute2)")
        self.folder, self.numbers = folder, range(1, number + 1)
        self.mark = f"mnist-dist-{os.getpid()}"
        self.switch = f"{self.mark}-switch"
        self.started: list[subprocess.Popen[str]] = []

    def namespace(self, number: int) -> str:
        """Its name, as `ip netns` has it."""
        return f"{self.mark}-{number}"

    def __enter__(self) -> Hosts:
        try:
            self._ip("netns", "add", self.switch)
            self._ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
            self._ip("-n", self.switch, "link", "set", "switch", "up")
            for number in self.numbers:
                self._add(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.communicate()
        for name in (self.switch, *map(self.namespace, self.numbers)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)

    def _ip(self, *words: object) -> None:
        subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)

    def _add(self, number: int) -> None:
        name = self.namespace(number)
        self._ip("netns", "add", name)
        self._ip("-n", name, "link", "set", "lo", "up")
        self._ip("link", "add", LINK, "netns", name, "type", "veth", "peer", "name", f"to{number}", "netns",
                 self.switch)
        self._ip("-n", self.switch, "link", "set", f"to{number}", "master", "switch", "up")
        self._ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", LINK)
        self._ip("-n", name, "link", "set", LINK, "up")
        self._ip("-n", name, "route", "add", "default", "dev", LINK)
        self.resolve(number, {f"machine{other}": f"10.77.0.{other}" if other != number else "127.0.1.1"
                              for other in self.numbers})

    def resolve(self, number: int, addresses: dict[str, str]) -> None:
        """The names that this host knows, beside localhost; there is no name server."""
        hosts = Path("/etc/netns", self.namespace(number), "hosts")
        hosts.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **addresses}.items()]
        hosts.write_text("".join(lines))
        hosts.with_name("resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once

    def start(self, number: int, *command: object, folder: Path | None = None, **environment: str
              ) -> subprocess.Popen[str]:
        """Start a command there, with what it prints in one pipe."""
        inside = f'hostname machine{number}; exec "$@"'
        self.started.append(subprocess.Popen(
            ["ip", "netns", "exec", self.namespace(number), "unshare", "--uts", "--pid", "--fork", "--kill-child",
             "--mount-proc", "sh", "-c", inside, "sh", *map(str, command)], cwd=folder or self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}))
        return self.started[-1]

    def cut(self, number: int) -> None:
        """The link of this host carries nothing any more."""
        self._ip("-n", self.namespace(number), "link", "set", LINK, "down")

    def limit(self, number: int, mbit: float) -> None:
        """What this host sends and receives is limited to so many Mbit/s."""
        # Bytes that may pass at once after a pause: of 1 ms, or the exchanges of a gradient pass faster than the link.
        burst = max(8192, int(mbit * 1e6 / 8 / 1000))
        for name, link in ((self.namespace(number), LINK), (self.switch, f"to{number}")):
            subprocess.run(["tc", "-n", name, "qdisc", "replace", "dev", link, "root", "tbf", "rate", f"{mbit}mbit",
                            "burst", str(burst), "latency", "400ms"], check=True, capture_output=True, timeout=20)
