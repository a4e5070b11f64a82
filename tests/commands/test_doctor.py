"""The doctor: what it finds on a machine that is ill, with the remedy; and a healthy one is left alone."""

from __future__ import annotations

import itertools
import json
import sys
import time

import pytest
from forked import run_forked
from hosts import Hosts
from support import mnist_dist
from wandb_server import WandbServer

from mnist_dist.commands.doctor import machine
from mnist_dist.commands.doctor.bandwidth import rounds
from mnist_dist.commands.doctor.machine import Finding, lines
from mnist_dist.processes.launch_environment import cores_of_container
from mnist_dist.training.steps.cpu_products import has_onednn

SMI = """#!/bin/sh
[ "$1" = topo ] && { printf 'GPU0 GPU1\\nGPU0 X NV18\\n'; exit 0; }
printf 'NVIDIA H100, 550.1, 81559, 1, 40, 16, 16, 0, Not Active, Not Active\\n'
printf 'NVIDIA H100, 550.1, 81559, 1, 40, %s\\n' "$ILL"
"""


def one(findings):
    (found,) = findings
    return found


def test_lines():
    ill = Finding("b", "bad", problem="it burns", remedy="water")
    assert lines([Finding("a", "fine", details=("more",)), ill]) == [
        "ok    a          fine", "      more",
        "LOOK  b          bad", "      problem: it burns", "      remedy:  water"]


def test_threads_and_cores(monkeypatch):
    monkeypatch.setattr(machine, "num_cores", lambda: 4)
    monkeypatch.setattr(machine, "_burnt", lambda block: (100, 0.25))
    there, threads = machine.cores(2, 2)
    assert there.problem is None and threads.problem is None and "4.0 do work at once" in there.says
    there, threads = machine.cores(2, 4)
    assert there.problem is None and threads.problem.startswith("4 processes of 2 threads on 4 cores")
    assert threads.remedy == "OMP_NUM_THREADS=1"
    assert list(machine.cores(1, 5))[1].remedy == "start at most 4 processes"
    counts = iter([(70, 0.175), (60, 0.2), (40, 0.1), (60, 0.1), (50, 0.1), (50, 0.1)])  # a neighbour takes the half
    monkeypatch.setattr(machine, "_burnt", lambda block: next(counts))
    assert "of 4 cores only 2.0 do work at once" in next(machine.cores(1, 1)).problem


@pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize(("onednn", "least", "said"), [
    (lambda left, right: time.sleep(0.1), 1, None),
    (lambda left, right: None, 1, "(mnist-dist takes oneDNN)"),
    (lambda left, right: None, None, "because its table lacks this processor)"),
])
def test_slow_products_are_one_line(onednn, least, said, monkeypatch):
    monkeypatch.setattr(machine, "product", onednn)
    monkeypatch.setattr(machine, "onednn_from", lambda kind: least)
    monkeypatch.setattr(machine, "PRODUCT_TURNS", 2)
    finding = one(machine.products())
    assert finding.problem is None and finding.value["mkl"] > 0
    assert "GFLOP/s" in finding.says and "\n" not in finding.says
    assert ("of oneDNN's here" in finding.says) == bool(said) and finding.says.endswith(said or "in float32")


@pytest.mark.parametrize(("files", "cores"), [
    ({"cpu.max": "max 100000\n"}, None), ({"cpu.max": "150000 100000\n"}, 1.5), ({}, None),
    ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
])
def test_the_share_of_a_container(files, cores, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores_of_container(tmp_path) == cores


def test_disks(monkeypatch, tmp_path):
    healthy = one(machine.disk(tmp_path / "not" / "there"))
    assert healthy.problem is None and str(tmp_path) in healthy.says and healthy.value["checkpoint_seconds"] > 0
    monkeypatch.setattr(machine, "_synced", lambda folder: 0.8)
    assert "takes 0.8 s to be on the disk" in one(machine.disk(tmp_path)).problem
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 5e6}))
    found = one(machine.disk(tmp_path))
    assert "only 5 MB are free" in found.problem and "make room" in found.remedy

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine, "_synced", full)
    assert "cannot be written (No space left on device)" in one(machine.disk(tmp_path)).problem


def test_data(small_dir, mnist_dir, mirror, no_other_mirror, tmp_path):
    good = one(machine.data("auto", str(small_dir)))
    assert good.problem is None and "1,009 and 211 images" in good.says and len(good.value) == 64
    there = one(machine.data("mnist", str(tmp_path), mirror.url))
    assert there.problem is None and there.says.endswith("the first run downloads it")
    assert mirror.asked.total() == 1 and list(tmp_path.iterdir()) == []
    mirror.fault = "404"
    gone = one(machine.data("mnist", str(tmp_path), mirror.url))
    assert "cannot be downloaded" in gone.problem and mirror.url in gone.problem and "--data-dir" in gone.remedy
    other = one(machine.data("fashion-mnist", str(mnist_dir)))
    assert other.problem and "are mnist, not fashion-mnist" in other.says and "--dataset mnist" in other.remedy
    for path in small_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-3] if "t10k-images" in path.name else path.read_bytes())
    assert "cannot be used" in one(machine.data("mnist", str(tmp_path))).problem


@pytest.mark.parametrize(("ill", "said"), [
    ("16, 16, 0, Not Active, Not Active", None), ("8, 16, 0, Not Active, Not Active", "PCIe link is narrower"),
    ("16, 16, 3, Not Active, Not Active", "3 uncorrected memory errors"),
    ("16, 16, [N/A], Active, Not Active", "slowed down"), ("16, 16, 0, Not Active, Active", "slowed down"),
])
def test_gpus(ill, said, monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("ILL", ill)
    first, second, joined = machine.gpus()
    assert (first.name, first.problem) == ("GPU 0", None) and "NV18" in joined.value
    assert (second.problem is None) == (said is None) and (said is None or said in second.problem)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert one(machine.gpus()).problem is None


@pytest.mark.parametrize("known", [True, False])
def test_a_stale_key(known, monkeypatch):
    import wandb

    with WandbServer(knows_key=known) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb.teardown()
        found = one(machine.tracking("auto"))
        wandb.teardown()
    assert found.value == "online" and (found.problem is None) == known
    assert known or ("does not know the key" in found.problem and "wandb login" in found.remedy)


@pytest.mark.parametrize("number", range(1, 8))
def test_rounds_have_each_pair_once(number):
    found = list(rounds(number))
    assert sorted(itertools.chain(*found)) == list(itertools.combinations(range(number), 2))
    for pairs in found:
        assert len(set(itertools.chain(*pairs))) == 2 * len(pairs), "a host has one partner at a time"


def test_one_process(small_dir, tmp_path):
    done = mnist_dist("doctor", "--json", "--data-dir", small_dir, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["healthy"] else 1), done.stderr
    names = [finding["name"] for finding in found["findings"]]
    assert names == ["versions", "cores", "threads", *["products"] * has_onednn(), "GPUs", "data", "disk", "W&B",
                     "processes", "gradient", "step"]
    assert not list(tmp_path.iterdir()), "it leaves nothing"


@pytest.mark.long
@pytest.mark.parametrize(("ill", "said"), [
    ("slow", ("step", "a step of process 1 on ")), ("wrong", ("gradient", "the gradient of process 1 on "))])
def test_a_rank_that_is_ill_is_named(ill, said, small_dir, tmp_path):
    done = run_forked(["doctor", "--json", "--data-dir", small_dir], cwd=tmp_path, size=3 if ill == "wrong" else 2,
                      target="doctored:main", environment={"ACCELERATE_USE_CPU": "true", "ILL": ill})
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1 and findings[said[0]]["problem"].startswith(said[1]), done.stdout
    assert len(findings["all-reduce"]["value"]) == 13
    for size in findings["all-reduce"]["value"]:
        ranks = len(findings["processes"]["value"])
        assert size["algorithm_bandwidth"] == pytest.approx(size["bytes"] / size["seconds"])
        assert size["bus_bandwidth"] == pytest.approx(size["algorithm_bandwidth"] * 2 * (ranks - 1) / ranks)


@pytest.mark.faults
def test_one_slow_link_of_three(small_dir, tmp_path):
    with Hosts(tmp_path, 3) as hosts:
        for number in hosts.numbers:
            hosts.limit(number, 50 if number == 3 else 1000)
        started = [hosts.start(number, sys.executable, "-m", "mnist_dist", "doctor", "--json", "--processes", 1,
                               "--machines", 3, "--machine-rank", number - 1, "--address", "10.77.0.1", "--data-dir",
                               small_dir, "--timeout", 60) for number in hosts.numbers]
        outputs = [process.communicate(timeout=200)[0] for process in started]
    findings = {finding["name"]: finding for finding in json.loads(
        outputs[0][outputs[0].index("{"):])["findings"]}  # after a line that says for whom it waits
    print(findings["links"]["says"])
    assert findings["links"]["problem"].startswith("the link of machine3 has ")
    assert {rank["host"] for rank in findings["processes"]["value"]} == {"machine1", "machine2", "machine3"}
    assert all("waits for" in line for output in outputs[1:] for line in output.splitlines())
