"""Every way to launch, each with 1, 2 and 3 CPU processes: the asked number runs, in one folder, with one W&B run; and
with --reproducible, the same bits. Those of seven launchers: ./launch/test.sh -m faults -n 0 -s -k same_bits
"""

from __future__ import annotations

import hashlib
import sys

import pytest
from support import ROOT, TORCHRUN, TRAIN, check_one_run, mnist_dist, result_of, run

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
CONFIG = ["--config_file", ROOT / "accelerate_config.yaml"]
WAYS = {
    "python": ([sys.executable], 1),
    "accelerate": (ACCELERATE, 1),
    "accelerate --cpu -n 1": ([*ACCELERATE, "--cpu", "--num_processes", "1"], 1),
    "accelerate -n 2": ([*ACCELERATE, "--num_processes", "2"], 2),
    "accelerate --cpu -n 3": ([*ACCELERATE, "--cpu", "--num_processes=3"], 3),
    "accelerate --multi_gpu -n 2": ([*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=0"], 2),
    "config": ([*ACCELERATE, *CONFIG], 1),
    "config -n 2": ([*ACCELERATE, *CONFIG, "--num_processes", "2"], 2),
    "config -n 3": ([*ACCELERATE, *CONFIG, "--num_processes", "3"], 3),
    "torchrun 1": ([*TORCHRUN, "--nproc-per-node=1"], 1),
    "torchrun 2": ([*TORCHRUN, "--nproc-per-node=2"], 2),
    "torchrun 3": ([*TORCHRUN, "--nproc-per-node=3"], 3),
}


LONG = ("accelerate", "config", "torchrun 2")
FAULTS = ("python", "accelerate --multi_gpu -n 2", "accelerate -n 2", "accelerate --cpu -n 1", "accelerate --cpu -n 3",
          "config -n 2", "config -n 3", "torchrun 1", "torchrun 3")


@pytest.mark.parametrize("way", [
    pytest.param(way, marks=[*[pytest.mark.long] * (way in LONG), *[pytest.mark.faults] * (way in FAULTS)])
    for way in WAYS
])
def test_the_asked_number_of_processes(way, no_hint, small_dir, tmp_path):
    command, size = WAYS[way]
    done = run([*command, TRAIN, "--data-dir", small_dir, "--max-steps", 3, "--batch-size", 50], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_one_run(tmp_path, size)
    assert done.stdout.count("writing to") == 1, "one process speaks"


OPTIONS = ["--reproducible", "--batch-size", "10", "--epochs", "2", "--wandb", "disabled", "--output-dir", "run"]


def by_srun(data, folder, slurm):
    return slurm.ask("srun", "--nodes=2", "--ntasks=2", sys.executable, TRAIN, *data, cwd=folder)


def by_submitit(data, folder, slurm):
    """A job that starts our command as two tasks, and waits for them."""
    submit = (
        "import submitit, sys; from mnist_dist.cli import run\n"
        "jobs = submitit.AutoExecutor('jobs', cluster='slurm'); jobs.update_parameters(nodes=2, tasks_per_node=1)\n"
        "print(jobs.submit(run, ['train', *sys.argv[1:]]).results())")
    return slurm.ask(sys.executable, "-c", submit, *data, cwd=folder)


def by_ray(data, folder, slurm):
    return mnist_dist("train", "--launcher", "ray", "--processes", 2, *data, cwd=folder)


def by_command(*words):
    return lambda data, folder, slurm: run([*words, *data], cwd=folder)


SEVEN = {
    "python": by_command(sys.executable, TRAIN),
    "--processes": by_command(sys.executable, "-m", "mnist_dist", "train", "--processes", 2),
    "accelerate": by_command(*ACCELERATE, "--cpu", "--num_processes", "2", TRAIN),
    "torchrun": by_command(*TORCHRUN, "--nproc-per-node=2", TRAIN), "srun": by_srun, "submitit": by_submitit,
    "ray": by_ray,
}


@pytest.fixture(scope="module")
def digests():
    """SHA-256 of each launcher's model."""
    return {}


@pytest.mark.faults
@pytest.mark.parametrize("launcher", SEVEN)
def test_two_processes_of_each_launcher_have_the_same_bits(launcher, digests, small_dir, tmp_path, request):
    if launcher in ("submitit", "ray"):
        pytest.importorskip(launcher)
    slurm = request.getfixturevalue("slurm") if launcher in ("srun", "submitit") else None
    said = SEVEN[launcher]([*OPTIONS, "--data-dir", str(small_dir)], tmp_path, slurm)
    assert (tmp_path / "run" / "result.json").exists(), said
    assert result_of(tmp_path / "run")["environment"]["num_processes"] == (1 if launcher == "python" else 2), said
    digests[launcher] = hashlib.sha256((tmp_path / "run" / "model.safetensors").read_bytes()).hexdigest()
    print(launcher, digests[launcher])
    assert len(set(digests.values())) == 1
