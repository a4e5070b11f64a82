"""Fixtures and the environment of all tests: one thread per process, no network, nothing of the user's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from support import ROOT, write_idx_folder

# before torch is imported anywhere; the command lines under test inherit it
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mnist-dist-tests-")  # holds no Accelerate config
os.environ["NETRC"] = os.devnull
for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MNIST_DIST_MIRROR", "ACCELERATE_USE_CPU"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; run all else on the CPU, also where there is one."""
    import torch

    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


@pytest.fixture(autouse=True)
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run on the CPU unless they are marked for CUDA."""
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The original MNIST files, where they are: beside the checkout, or where MNIST_DIST_TEST_DATA says."""
    folder = Path(os.environ.get("MNIST_DIST_TEST_DATA", ROOT.parent / "shared" / "data" / "mnist"))
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(f"the original MNIST files are not in {folder}")
    return folder


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,009 training and 211 test images: primes, which nothing divides."""
    return write_idx_folder(tmp_path_factory.mktemp("small"), 1009, 211)
