"""What the benchmark ran on: processor, GPUs, cores, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from typing import Any

from mnist_dist.processes.launch_environment import num_cores
from mnist_dist.record.environment import git_commit, processor_family, processor_name, vector_instructions

LIBRARIES = ("torch", "torchvision", "accelerate", "lightning", "scikit-learn", "jax", "jaxlib", "numpy")


def describe() -> dict[str, Any]:
    """Hardware and versions, for the record; without a GPU also the GFLOP/s of each library's matrix products."""
    import torch

    from benchmarks.products import gflops
    from mnist_dist.processes.launch_environment import read_launch
    from mnist_dist.processes.spawn import runs_on_cpu

    number = 0 if runs_on_cpu(read_launch()) else torch.cuda.device_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(number)]
    return {
        "processor": processor_name(), "family": processor_family(), "vector_instructions": vector_instructions(),
        "gflops": {} if gpus else gflops(), "cores": num_cores(), "gpus": gpus, "system": platform.platform(),
        "load_before": os.getloadavg()[0], "commit": git_commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine's name for a file: of its GPU, else of its processor."""
    name = machine["gpus"][0] if machine["gpus"] else machine["processor"]
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
