"""Twelve faults, planted for real: the doctor, or the start, names each with its remedy. Healthy machines get no alarm.

All of them, with what is said: ./launch/test.sh -m "faults or long" -n 0 -s tests/commands/test_doctor_finds.py
In CI only the launchers are tried here; a slow process and a slow link are in test_doctor.py.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import run_forked
from hosts import Hosts
from support import TRAIN, run, write_idx_folder
from wandb_server import WandbServer

from mnist_dist.processes.launch_environment import num_cores

DOCTOR = [sys.executable, "-m", "mnist_dist", "doctor"]


class Place:
    """A folder to work in, with data."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self.folder, self.data_dir = folder, data_dir

    def doctor(self, *words, before=(), **environment):
        """What the doctor says here."""
        done = run([*before, *DOCTOR, "--data-dir", self.data_dir, "--wandb", "disabled", *words], cwd=self.folder,
                   ACCELERATE_USE_CPU="true", **environment)
        return done.stdout + done.stderr

    def on_hosts(self, number, *words, address="10.77.0.1", prepare=lambda hosts: None, ill=None, **environment):
        """What it says on so many machines, one after the other; `environment` is that of the machine `ill`."""
        with Hosts(self.folder, number) as hosts:
            prepare(hosts)
            started = [hosts.start(one, *DOCTOR, "--processes", 1, "--machines", number, "--machine-rank", one - 1,
                                   "--address", address, "--data-dir", self.data_dir, "--timeout", 20, "--wandb",
                                   "disabled", *(str(word).format(number=one) for word in words),
                                   **(environment if one == ill else {})) for one in hosts.numbers]
            return "".join(process.communicate(timeout=200)[0] for process in started)

    def site(self, program):
        """A PYTHONPATH with which every Python runs this first."""
        (self.folder / "site").mkdir()
        (self.folder / "site" / "sitecustomize.py").write_text(program)
        return f"{self.folder / 'site'}:{Path(TRAIN).parent}"


def too_many_threads(place):
    return place.doctor("--processes", 2, OMP_NUM_THREADS=str(num_cores()))


def slow_rank(place):
    done = run_forked(["doctor", "--data-dir", place.data_dir, "--wandb", "disabled"], cwd=place.folder, size=2,
                      target="doctored:main", environment={"ACCELERATE_USE_CPU": "true", "ILL": "slow"})
    return done.stdout


def slow_link(place):
    def limits(hosts):
        for number in hosts.numbers:
            hosts.limit(number, 50 if number == 2 else 1000)

    return place.on_hosts(3, prepare=limits)


def wrong_interface(place):
    return place.on_hosts(2, ill=2, GLOO_SOCKET_IFNAME="eth9")


def unresolvable_name(place):
    return place.on_hosts(2, address="node-one")


def different_torch(place):
    return place.on_hosts(2, ill=2, PYTHONPATH=place.site("import torch; torch.__version__ = '2.6.0'"))


def different_data(place):
    for number in (1, 2):
        write_idx_folder(place.folder / f"data{number}", 1009, 210 + number)
    return place.on_hosts(2, "--data-dir", "data{number}")


def stale_key(place):
    with WandbServer(knows_key=False) as server:
        return place.doctor("--wandb", "auto", WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL=server.url)


def full_disk(place):
    disk = place.folder / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode:
        pytest.skip("a small disk needs root")
    try:
        return place.doctor("--output-dir", disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


def slow_disk(place):
    if not shutil.which("strace"):
        pytest.skip("a slow disk needs strace (apt-get install strace)")
    return place.doctor(before=["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e",
                                "inject=fsync:delay_enter=700000"])


@contextmanager
def half_of_the_cores():
    """The first words of a command that gets half of this machine's cores, by a control group."""
    folder = Path("/sys/fs/cgroup/cpu", f"mnist-dist-{os.getpid()}")
    limits = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": str(50_000 * num_cores())}
    if not folder.parent.is_dir():
        folder, limits = Path("/sys/fs/cgroup", folder.name), {"cpu.max": f"{50_000 * num_cores()} 100000"}
    try:
        folder.mkdir()
        for name, text in limits.items():
            (folder / name).write_text(text)
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error.strerror})")
    try:
        yield ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh"]
    finally:
        folder.rmdir()


def fewer_cores(place):
    with half_of_the_cores() as before:
        return place.doctor(before=before)


def clocks_apart(place):
    late = "import time; now = time.time; time.time = lambda: now() + 90"
    return place.on_hosts(2, ill=2, PYTHONPATH=place.site(late))


PLANTED = {  # the problem, and the remedy, as regular expressions
    too_many_threads: ("2 processes of \\d+ threads on", "OMP_NUM_THREADS=1"),
    slow_rank: ("a step of process 1 on .* takes", "see what else runs there"),
    slow_link: ("the link of machine2 has \\d+ Mbit/s", "check the cable"),
    wrong_interface: ("machine2 has no interface eth9", "name one of .*veth0"),
    unresolvable_name: ("address node-one does not resolve on machine1", "--address must be an IP address"),
    different_torch: ("torch is .* on machine1 and 2.6.0 on machine2", "install the same on every machine"),
    different_data: ("the data differs: ", "copy the same files to every machine"),
    stale_key: ("does not know the key", "wandb login"),
    full_disk: ("cannot be written \\(No space left on device\\)|only \\d+ MB are free", "make room"),
    slow_disk: ("a checkpoint takes \\d+\\.\\d s to be on the disk", "give an --output-dir on a local disk"),
    fewer_cores: ("of \\d+ cores only", "raise the container's share"),
    clocks_apart: ("clock", "timedatectl set-ntp true"),
}


@pytest.mark.faults
@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named(fault, small_dir, tmp_path):
    said = fault(Place(tmp_path, small_dir))
    problem, remedy = PLANTED[fault]
    print(said)
    assert re.search(problem, said) and re.search(remedy, said), said
    assert "Traceback" not in said


LAUNCHERS = {  # the words before `doctor`, for two processes
    "python": [sys.executable, "-m", "mnist_dist"],
    "accelerate launch": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 1,
                          "--num_processes", 2, "--mixed_precision", "no", "--dynamo_backend", "no",
                          "--main_process_port", 0, "--module", "mnist_dist"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m",
                 "mnist_dist"],
}


def under(launcher, data_dir, folder):
    words = ["--processes", 2] if launcher == "python" else []
    return run([*LAUNCHERS[launcher], "doctor", "--json", "--data-dir", data_dir, "--wandb", "disabled", *words],
               cwd=folder, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("launcher", [
    pytest.param(launcher, marks=pytest.mark.long if launcher == "torchrun" else pytest.mark.faults)
    for launcher in LAUNCHERS])
def test_every_launcher_has_its_ranks(launcher, small_dir, tmp_path):
    begin = time.monotonic()
    done = under(launcher, small_dir, tmp_path)
    findings = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert [{name: one[name] for name in ("rank", "host", "device", "backend")}
            for one in findings["processes"]["value"]] == [
        {"rank": rank, "host": platform.node(), "device": "cpu (gloo)", "backend": "gloo"} for rank in (0, 1)
    ], done.stderr
    assert findings["threads"]["value"] == {"threads": 1, "processes": 2} and "links" not in findings
    assert len(findings["all-reduce"]["value"]) == 13 and time.monotonic() - begin < 60


@pytest.mark.faults
@pytest.mark.parametrize("attempt", range(20))
def test_a_healthy_machine_gets_no_alarm(attempt, small_dir, tmp_path):
    """One, or two processes under each launcher, in turns. Needs a machine on which nothing else runs."""
    if attempt % 4 == 3:
        done = run([*DOCTOR, "--json", "--data-dir", small_dir, "--wandb", "disabled"], cwd=tmp_path)
    else:
        done = under(list(LAUNCHERS)[attempt % 4], small_dir, tmp_path)
    alarms = [one["problem"] for one in json.loads(done.stdout)["findings"] if one["problem"]]
    assert alarms == [] and done.returncode == 0, done.stderr
