"""Fixtures and the environment of all tests: one thread per process, no network, nothing of the user's."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_mirror import mirror, no_other_mirror  # noqa: F401
from hypothesis import settings
from slurm_cluster import Slurm, missing
from support import ROOT, mnist_dist, write_idx_folder

from mnist_dist.processes.launch_environment import TORCH

settings.register_profile("no deadline", deadline=None)  # a time is no reason to fail
settings.load_profile("no deadline")
# before torch is imported anywhere; the command lines under test inherit it
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mnist-dist-tests-")  # holds no Accelerate config
os.environ["NETRC"] = os.devnull
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "mnist-dist-tests-compiled")))
for name in [name for name in os.environ if name.startswith("WANDB_")] + [
        "MNIST_DIST_MIRROR", "ACCELERATE_USE_CPU", *TORCH, "MASTER_ADDR", "MASTER_PORT"]:
    os.environ.pop(name, None)
os.environ["WANDB_CONFIG_DIR"] = os.environ["HF_HOME"]  # holds no settings either
# under nohup these tests would be runs that ignore a closed terminal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])


# The files that take longest, in this order; the others follow as they are collected.
LONGEST = ("test_exactness.py", "test_compiled.py", "test_study.py", "test_intervals.py", "test_restarts.py",
           "test_gpu_in_turns.py", "test_fused.py", "test_slurm.py", "test_ray_launcher.py", "test_output.py",
           "test_hostile_folders.py", "test_ways_to_launch.py", "test_signals.py", "test_disk_faults.py",
           "test_launch.py", "test_wandb_run.py", "test_places.py", "test_machines.py", "test_time_to_target.py",
           "test_noise_scale.py", "test_data.py", "test_rounds.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, so that all workers end together; skip what needs a GPU on a machine without one."""
    import torch

    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if marker := item.get_closest_marker("cuda"):
            needed = marker.args[0] if marker.args else 1
            if not gpus:  # on one GPU the ranks of a test for two share it
                item.add_marker(pytest.mark.skip(reason=f"needs CUDA GPUs: {needed}; on this machine: {gpus}"))


@pytest.fixture(autouse=True)
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run on the CPU unless they are marked for CUDA."""
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says that the CPU is meant, as on a machine without a GPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the launchers would use it")
    monkeypatch.delenv("ACCELERATE_USE_CPU")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The original MNIST files, packed: in the folder that MNIST_DIST_TEST_DATA names, or in data/."""
    for folder in (os.environ.get("MNIST_DIST_TEST_DATA"), ROOT / "data", ROOT / "data" / "MNIST" / "raw"):
        if folder and Path(folder, "train-images-idx3-ubyte.gz").exists():
            return Path(folder)
    pytest.skip("the original MNIST files are not here: name a folder that has the four .gz files in "
                "MNIST_DIST_TEST_DATA, or put them into data/ (python train.py downloads them there)")


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,009 training and 211 test images: primes, which nothing divides."""
    return write_idx_folder(tmp_path_factory.mktemp("small"), 1009, 211)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a run's two checkpoints, and not for the third, written before one goes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A SLURM with two nodes."""
    if missing():
        pytest.skip(missing())
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Slurm(Path(folder)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def alone(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """For a number of epochs: the model of a reproducible run of batch 10 on one process that nothing disturbs."""
    @functools.cache
    def model(epochs: int) -> bytes:
        folder = tmp_path_factory.mktemp("alone")
        done = mnist_dist("train", "--reproducible", "--batch-size", 10, "--epochs", epochs, "--wandb", "disabled",
                          "--data-dir", small_dir, "--output-dir", "run", cwd=folder, timeout=400,
                          OMP_NUM_THREADS="1")  # threads that wait for each other are slow beside other tests
        assert done.returncode == 0, done.stderr
        return (folder / "run" / "model.safetensors").read_bytes()

    return model
