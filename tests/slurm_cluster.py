"""A SLURM of this machine's own, for tests: Debian's daemons in a folder, two nodes that are both this machine.

    with Slurm(folder) as slurm:
        job = slurm.submit("launch/slurm.sbatch", "--epochs", 3)

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
from pathlib import Path

import psutil
from support import ROOT

from mnist_dist import runner

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
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
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=test Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
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


class Slurm:
    """The daemons, from `with` on. `folder` must have a short path: munge's socket is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.daemons = folder, uuid.uuid4().hex, []
        self.environment = {**os.environ, runner.MARK: self.mark, "SLURM_CONF": str(folder / "slurm.conf"),
                            "MASTER_ADDR": own_address(),  # the nodes' names have none here
                            "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for name in ("state", "n1", "n2"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)  # munge refuses another
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        port, first, second = free_ports(3)
        (folder / "slurm.conf").write_text(CONFIG.format(host=platform.node(), folder=folder, port=port, first=first,
                                                         second=second))

    def __enter__(self) -> Slurm:
        self._daemon("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key",
                     *(f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in (
                         "pid-file", "log-file", "seed-file")), f"--socket={self.folder}/munge.sock")
        while not (self.folder / "munge.sock").exists():
            assert self.daemons[0].poll() is None, self.daemons[0].communicate()
            time.sleep(0.05)
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        until = time.monotonic() + 30
        while self.ask("sinfo", "-h", "-N", "-o", "%t").split()[:2] != ["idle", "idle"]:
            assert time.monotonic() < until, self.ask("sinfo")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        runner.end_tree(self.mark)
        for daemon in self.daemons:
            daemon.communicate()

    def _daemon(self, *words: str) -> None:
        self.daemons.append(subprocess.Popen(words, env=self.environment, stdin=subprocess.DEVNULL,
                                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def ask(self, *words: object, cwd: Path | None = None) -> str:
        """What a command of SLURM's prints."""
        done = subprocess.run([str(word) for word in words], env=self.environment, cwd=cwd, text=True, timeout=200,
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
