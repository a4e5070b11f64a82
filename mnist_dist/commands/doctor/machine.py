"""What `mnist-dist doctor` finds out about one machine: versions, cores, GPUs, data, disk, W&B.

Each check returns findings: a value for programs, a text for people, and if something is wrong, the problem with its
remedy. A check never fails: if it cannot find something out, it says so.

In one file, because the checks are a list in which each is short and none needs another.
"""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mnist_dist.data import check_name, load
from mnist_dist.data.download import TORCHVISION_CLASS, answers
from mnist_dist.data.layouts import find
from mnist_dist.errors import MnistDistError
from mnist_dist.processes.launch_environment import cores_of_container, num_cores
from mnist_dist.record.environment import processor_name
from mnist_dist.record.wandb_mode import ANSWER_SECONDS, key_of, trusted_settings, wandb_mode
from mnist_dist.text import cause, counted
from mnist_dist.training.steps.cpu_products import has_onednn, onednn_from, product

CHECKPOINT_BYTES = 2_500_000  # weights and Adam's moments of 784-256-10 in float32
FREE_BYTES = 1_000_000_000  # on the disk of the runs: less may not be enough for a study
SYNC_SECONDS = 0.5  # to have a checkpoint on the disk: more makes training wait for it
BURN_SECONDS = 0.25  # of work on every core at once
PRODUCT_TURNS = 30  # of which the fastest counts
SLOW_PRODUCTS = 0.7  # of oneDNN's rate: below it PyTorch's products are reported as slow
LEAST_OF_CORES = 0.7  # of the work that all cores together should do


@dataclass(frozen=True)
class Finding:
    """`says` is for people, `value` for programs. `problem` and `remedy` are None if nothing is wrong."""

    name: str
    says: str
    value: Any = None
    problem: str | None = None
    remedy: str | None = None
    details: tuple[str, ...] = ()  # lines for people


def versions() -> Iterator[Finding]:
    """Versions of the software that the measurements depend on."""
    installed: dict[str, str | None] = {"Python": platform.python_version()}
    for name in ("torch", "accelerate", "numpy", "wandb"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    said = ", ".join(f"{name} {version or '(not installed)'}" for name, version in installed.items())
    yield Finding("versions", said, installed)


def _burnt(block: bytes) -> tuple[int, float]:
    """Blocks hashed in `BURN_SECONDS`, and the seconds of a core that they took; hashing lets other threads run."""
    begin, end, count = time.thread_time(), time.perf_counter() + BURN_SECONDS, 0
    while time.perf_counter() < end:
        hashlib.sha256(block)
        count += 1
    return count, time.thread_time() - begin


def cores(threads: int, processes: int) -> Iterator[Finding]:
    """Cores that this process may use, cores that work at once, and whether the threads fit on them."""
    number, share, block = num_cores(), cores_of_container(), bytes(1_000_000)
    # the work of a whole core: only the time of this thread counts, so that other processes do not change it
    alone = max(count / seconds for count, seconds in (_burnt(block), _burnt(block)))
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        together = sum(count for count, _ in pool.map(_burnt, [block] * number))
    there = together / (alone * BURN_SECONDS)
    says = (f"{number} of {os.cpu_count()} cores ({processor_name()})"
            f"{'' if share is None else f', its container has {share:g}'}; {there:.1f} do work at once")
    problem = remedy = None
    if there < LEAST_OF_CORES * number:
        problem = f"of {counted(number, 'core')} only {there:.1f} do work at once"
        remedy = "end what else runs here, raise the container's share, or start fewer processes"
    yield Finding("cores", says, {"usable": number, "of": os.cpu_count(), "container": share, "working": there},
                  problem, remedy)
    problem = remedy = None
    if threads * processes > number:
        problem = (f"{counted(processes, 'process', 'processes')} of {counted(threads, 'thread')} on "
                   f"{counted(number, 'core')}: a step may take a hundred times as "
                   "long")
        remedy = f"OMP_NUM_THREADS={max(1, number // processes)}" if processes <= number else (
            f"start at most {counted(number, 'process', 'processes')}")
    yield Finding("threads", f"{threads} per process, {counted(processes, 'process', 'processes')} here",
                  {"threads": threads, "processes": processes}, problem, remedy)


def products() -> Iterator[Finding]:
    """How fast PyTorch's products are beside oneDNN's, which it has too: MKL takes a slow path on some processors."""
    if not has_onednn():
        return
    left_MK, right_NK = torch.randn(1000, 784), torch.randn(256, 784)
    calls = {"mkl": lambda: left_MK @ right_NK.t(), "onednn": lambda: product(left_MK, right_NK)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(PRODUCT_TURNS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    gflops = {name: 2e-9 * left_MK.numel() * len(right_NK) / min(each) for name, each in seconds.items()}
    library = "MKL" if torch.backends.mkl.is_available() else "PyTorch's own"
    says = f"{library} {gflops['mkl']:,.0f}, oneDNN {gflops['onednn']:,.0f} GFLOP/s in float32"
    part = gflops["mkl"] / gflops["onednn"]
    if part < SLOW_PRODUCTS:
        taken = "oneDNN" if onednn_from("plain") else "PyTorch's own, because its table lacks this processor"
        says += f": PyTorch's products run at {100 * part:.0f} % of oneDNN's here (mnist-dist takes {taken})"
    yield Finding("products", says, gflops)


GPU_FIELDS = ("name", "driver_version", "memory.total", "memory.used", "temperature.gpu", "pcie.link.width.current",
              "pcie.link.width.max", "ecc.errors.uncorrected.volatile.total",
              "clocks_throttle_reasons.hw_slowdown", "clocks_throttle_reasons.sw_thermal_slowdown")


def gpus() -> Iterator[Finding]:
    """GPUs as `nvidia-smi` sees them, and how they are joined."""
    words = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
        topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        yield Finding("GPUs", "none (no nvidia-smi)", [])
        return
    if done.returncode:
        yield Finding("GPUs", f"nvidia-smi says: {done.stdout.strip()[:100]}", [], "the driver does not answer",
                      "start the driver, or the machine, again")
        return
    for number, line in enumerate(done.stdout.strip().splitlines()):
        fields = dict(zip(GPU_FIELDS, (part.strip() for part in line.split(",")), strict=False))
        yield _gpu(number, fields)
    if "GPU1" in topology:
        yield Finding("joined by", "nvidia-smi topo -m", topology, details=tuple(topology.splitlines()))


def _gpu(number: int, gpu: dict[str, str]) -> Finding:
    says = (f"{gpu['name']}, driver {gpu['driver_version']}, {gpu['memory.used']} of {gpu['memory.total']} MiB in use, "
            f"{gpu['temperature.gpu']} C, PCIe x{gpu['pcie.link.width.current']} of x{gpu['pcie.link.width.max']}")
    problem = remedy = None
    if "Active" in (gpu.get(GPU_FIELDS[8]), gpu.get(GPU_FIELDS[9])):
        problem, remedy = "it is slowed down because of heat or power", "check its cooling and its power supply"
    elif gpu.get(GPU_FIELDS[7], "0") not in ("0", "[N/A]"):
        problem = f"{gpu[GPU_FIELDS[7]]} uncorrected memory errors"
        remedy = "reset it, and have it replaced if they return"
    elif gpu["pcie.link.width.current"] != gpu["pcie.link.width.max"]:
        problem = "its PCIe link is narrower than it can be"
        remedy = "look again while it works, then reseat it or try another slot"
    return Finding(f"GPU {number}", says, gpu, problem, remedy)


def data(dataset: str, data_dir: str, mirror: str | None = None) -> Iterator[Finding]:
    """The data set, without a download, and the digest of its content; or whether it could be downloaded."""
    name, warnings = "mnist" if dataset == "auto" else dataset, list[str]()
    try:
        if name != "synthetic" and find(Path(data_dir), TORCHVISION_CLASS[name]) is None:
            why = answers(name, mirror)
            says = f"no {name} in {data_dir}: the first run downloads it" if why is None else f"no {name} in {data_dir}"
            yield Finding("data", says, None, why and f"{name} cannot be downloaded ({why})",
                          why and "check --mirror and the network, or name a folder that has the files in --data-dir")
            return
        sets = load(name, data_dir)
        digest = sets.digest()
        check_name(name, data_dir, digest, warnings.append)
    except MnistDistError as error:
        yield Finding("data", str(error), None, f"{name} in {data_dir} cannot be used", str(error))
        return
    yield Finding("data", f"{name}: {len(sets.train):,} and {len(sets.test):,} images, {digest[:12]}", digest,
                  details=tuple(warnings))


def disk(folder: Path) -> Iterator[Finding]:
    """The disk of the runs: what is free, and the time until a checkpoint is on it."""
    there = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.is_dir())
    try:
        free = shutil.disk_usage(there).free
        seconds = statistics.median(_synced(there) for _ in range(3))
    except OSError as error:
        yield Finding("disk", f"{there}: {error.strerror}", None, f"{there} cannot be written ({error.strerror})",
                      "give another --output-dir, or make room")
        return
    problem = remedy = None
    if free < FREE_BYTES:
        problem, remedy = f"only {free / 1e6:,.0f} MB are free in {there}", "make room, or give another --output-dir"
    elif seconds > SYNC_SECONDS:
        problem = f"a checkpoint takes {seconds:.1f} s to be on the disk of {there}"
        remedy = "give an --output-dir on a local disk, or a longer --checkpoint-every"
    yield Finding("disk", f"{there}: {free / 1e9:,.0f} GB free, a checkpoint is on it after {1000 * seconds:.0f} ms",
                  {"free_bytes": free, "checkpoint_seconds": seconds}, problem, remedy)


def _synced(folder: Path) -> float:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        file.write(bytes(CHECKPOINT_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - begin


def tracking(asked: str) -> Iterator[Finding]:
    """W&B: what a run would do, and whether its server takes the key."""
    said: list[str] = []
    mode = wandb_mode(asked, said.append)
    problem = remedy = None
    if said:
        problem, remedy = said[0], "wandb login, or check the network; a run without it is recorded offline"
    elif mode == "online":
        problem = _refused()
        remedy = problem and "wandb login --relogin with a key from your W&B settings"
    yield Finding("W&B", mode, mode, problem, remedy)


def _refused() -> str | None:
    """Why the server does not take the key; None if it does."""
    settings = trusted_settings()
    key = base64.b64encode(f"api:{key_of(settings)}".encode()).decode()
    question = urllib.request.Request(
        f"{settings.base_url}/graphql", data=b'{"query": "{ viewer { id } }"}',
        headers={"Content-Type": "application/json", "Authorization": f"Basic {key}"})
    try:
        with urllib.request.urlopen(question, timeout=ANSWER_SECONDS) as answer:
            viewer = (json.loads(answer.read(1_000_000)).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        return f"{settings.base_url} does not take the key ({error.code})"
    except (OSError, ValueError) as error:
        return f"{settings.base_url} does not answer ({cause(error)})"
    return None if viewer else f"{settings.base_url} does not know the key"


def lines(findings: Sequence[Finding]) -> list[str]:
    """For people: a line for each finding, and under it what is wrong and what to do."""
    shown = []
    for finding in findings:
        shown.append(f"{'ok  ' if finding.problem is None else 'LOOK'}  {finding.name:10} {finding.says}")
        shown += [f"      {line}" for line in finding.details]
        if finding.problem is not None:
            shown += [f"      problem: {finding.problem}", f"      remedy:  {finding.remedy}"]
    return shown
