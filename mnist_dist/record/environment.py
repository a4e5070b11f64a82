"""The environment of a run: hardware, versions, commit. Asking for the processor or the commit needs no torch."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The environment in `result.json`."""

    device: str
    device_name: str
    num_processes: int
    num_machines: int
    num_threads: int
    mixed_precision: str
    step: str
    torch: str
    accelerate: str
    python: str
    mnist_dist: str
    git_commit: str | None
    onednn_from: int | None = None  # least multiplications of a product that is oneDNN's (steps/cpu_products.py)


def _of_processor(*names: str) -> str | None:
    """What the system says of the first processor under one of these names; None if it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(names)), None)


def processor_name() -> str:
    """The processor's name, or its architecture if the system does not tell."""
    return _of_processor("model name") or platform.processor() or platform.machine()


def processor_family() -> tuple[str, int] | None:
    """Maker and family of an x86 processor, as ("AuthenticAMD", 26) for Zen 5; None of another, or if it is unknown."""
    maker, family = _of_processor("vendor_id"), _of_processor("cpu family") or ""
    return (maker, int(family)) if maker and family.isdecimal() else None


def vector_instructions() -> list[str]:
    """The vector and matrix instructions that the system names, as avx512_bf16 of x86 and sve of ARM."""
    features = _of_processor("flags", "Features") or ""
    return sorted(name for name in features.split() if name.startswith(("avx", "amx", "asimd", "sve")))


def processor_kind() -> str:
    """A short name for processors that run the same code. Two processors with one name may not."""
    features = _of_processor("flags", "Features") or ""  # as x86 and ARM have it
    words = [platform.machine(), processor_name(), *sorted(features.split())]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout that holds the folder, by default this code, with -dirty after local changes; None
    outside a checkout.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
