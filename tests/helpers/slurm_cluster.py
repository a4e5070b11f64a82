"""A SLURM for tests: Debian's daemons in a folder, with two nodes that are both this machine, or a node on each host.

    with Slurm(folder) as slurm:
        job = slurm.submit("launch/slurm.sbatch", "--epochs", 3)
    with Hosts(folder, 3) as hosts, SlurmOnHosts(folder, hosts) as slurm:  # the controller on host 1, nodes on 2 and 3
        slurm.kill(3)

Needs root, and the packages slurm-wlm and munge. The daemons, and what they have started, are gone at the end.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from hosts import Hosts
from support import ROOT

from mnist_dist import runner

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=30
SlurmdTimeout=10
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no SLURM here; "" if there can."""
    if os.geteuid() or not all(map(shutil.which, DAEMONS)):
        return "needs root and SLURM: apt-get install slurm-wlm munge"
    return ""


def free_ports(count: int) -> list[int]:
    """Ports that nothing uses at this moment."""
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def own_address() -> str:
    """An address of this machine that is no loopback one, which two machines would not have in common."""
    found = [one for several in psutil.net_if_addrs().values() for one in several if one.family.name == "AF_INET"]
    return next((one.address for one in found if not one.address.startswith("127.")), "127.0.0.1")


def run_of(folder: Path, job: str) -> Path:
    """The folder of the run of a job that was submitted there: its name has the time too."""
    return next(iter(sorted((folder / "runs").glob(f"slurm-{job}-*"))), folder / "no run yet")


def wait_until(what: Callable[[], object], deadline: float = 180.0) -> None:
    """Wait until it is true."""
    until = time.monotonic() + deadline
    while not what():
        assert time.monotonic() < until
        time.sleep(0.1)


class Slurm:
    """The daemons, from `with` on. `folder` must have a short path: munge's socket is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.daemons: dict[str, subprocess.Popen[str]] = {}  # by what they are
        self.environment = {**os.environ, runner.MARK: self.mark, "SLURM_CONF": str(folder / "slurm.conf"),
                            "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        controller, nodes = self.places()
        (folder / "state").mkdir(parents=True)
        for name in nodes:
            (folder / name).mkdir()
        folder.chmod(0o755)  # munge refuses another
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        lines = [f"NodeName={name} {place} CPUs=2 RealMemory=4000 State=UNKNOWN" for name, place in nodes.items()]
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, port=free_ports(1)[0], controller=controller,
                                                         nodes="\n".join(lines)))

    def places(self) -> tuple[str, dict[str, str]]:
        """Where the controller is, and each node."""
        self.environment["MASTER_ADDR"] = own_address()  # the nodes' names have none here
        host = platform.node()
        return f"{host}(127.0.0.1)", {name: f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
                                      for name, port in zip(("n1", "n2"), free_ports(2), strict=True)}

    def __enter__(self) -> Slurm:
        self._daemon("munged", "munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key",
                     *(f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in (
                         "pid-file", "log-file", "seed-file")), f"--socket={self.folder}/munge.sock")
        while not (self.folder / "munge.sock").exists():
            assert self.daemons["munged"].poll() is None, self.daemons["munged"].communicate()
            time.sleep(0.05)
        self.start()
        return self

    def start(self) -> None:
        """Start the controller and the nodes."""
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon(node, "slurmd", "-D", "-N", node)
        self.wait_for_nodes(2)

    def wait_for_nodes(self, number: int) -> None:
        """Wait until so many nodes are idle."""
        until = time.monotonic() + 30
        while self.ask("sinfo", "-h", "-N", "-p", "test", "-o", "%t").split().count("idle") != number:
            assert time.monotonic() < until, self.ask("sinfo")
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        runner.end_tree(self.mark)
        for daemon in self.daemons.values():
            daemon.communicate()

    def _daemon(self, name: str, *words: str) -> None:
        self.daemons[name] = subprocess.Popen(words, env=self.environment, text=True, stdin=subprocess.DEVNULL,
                                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def command(self, words: Sequence[object]) -> list[str]:
        """A command, where users type it."""
        return [str(word) for word in words]

    def ask(self, *words: object, cwd: Path | None = None) -> str:
        """What a command of SLURM's prints."""
        done = subprocess.run(self.command(words), env=self.environment, cwd=cwd, text=True, timeout=200,
                              capture_output=True)
        return done.stdout + done.stderr

    def submit(self, *words: object, cwd: Path) -> str:
        """The number of a job that is submitted there."""
        said = self.ask("sbatch", "--parsable", *words, cwd=cwd)
        assert said.strip().isdecimal(), said
        return said.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, …; "" if the job is over."""
        return self.ask("squeue", "-h", "-j", job, "-o", "%T").strip() if job else ""


class SlurmOnHosts(Slurm):
    """The controller on host 1, where users type, and a node on each other host. Each host has a PID namespace."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.hosts = hosts
        super().__init__(folder)

    def places(self) -> tuple[str, dict[str, str]]:
        port = free_ports(1)[0]
        return "machine1(10.77.0.1)", {
            f"machine{n}": f"NodeHostname=machine{n} NodeAddr=10.77.0.{n} Port={port}" for n in self.hosts.numbers[1:]}

    def start(self) -> None:
        self._daemon("slurmctld", *self.on_host(1, "slurmctld", "-D"))

    def on_host(self, number: int, *words: object) -> list[str]:
        """A command there. Not by `ip netns exec`: it hides /sys/fs/cgroup, without which slurmd does not start."""
        name = self.hosts.namespace(number)
        inside = f'hostname machine{number}; mount --bind /etc/netns/{name}/hosts /etc/hosts; exec "$@"'
        return ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "nsenter",
                f"--net=/run/netns/{name}", "sh", "-c", inside, "sh", *map(str, words)]

    def command(self, words: Sequence[object]) -> list[str]:
        return self.on_host(1, *words)

    def boot(self, number: int) -> None:
        """The host starts, and its node with it: -b says that it is a new start of the machine."""
        self._daemon(f"machine{number}", *self.on_host(number, "slurmd", "-D", "-b"))

    def kill(self, number: int) -> None:
        """The host loses its power: everything on it is gone."""
        daemon = self.daemons.pop(f"machine{number}")
        daemon.kill()  # and by --kill-child the first process of its PID namespace, and with that all of them
        daemon.communicate()
