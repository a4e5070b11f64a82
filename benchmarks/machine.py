"""What the benchmark ran on: processor, GPUs, cores, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "torchvision", "accelerate", "lightning", "scikit-learn", "jax", "jaxlib", "numpy")


def describe() -> dict[str, Any]:
    """Hardware and versions, for the record."""
    import torch

    from mnist_dist.launching import cpu_wanted

    gpus = [] if cpu_wanted() else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(), "cores": num_cores(), "gpus": gpus, "system": platform.platform(),
        "load_before": os.getloadavg()[0], "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(machine: dict[str, Any]) -> str:
    """The machine's name for a file: of its GPU, else of its processor."""
    name = machine["gpus"][0] if machine["gpus"] else machine["processor"]
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with -dirty where it was changed; None where there is none."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
