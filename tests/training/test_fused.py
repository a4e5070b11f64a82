"""The fused step without a GPU: run by Triton's interpreter, compiled ahead for GPUs, and where it cannot be taken.

Not tested here: the barrier between programs, and speed. tests/training/test_cuda.py has them, on a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, result_of, run, run_here

from mnist_dist.config import TrainConfig
from mnist_dist.errors import UserError
from mnist_dist.training import run as run_module
from mnist_dist.training.run import Run
from mnist_dist.training.steps import fused, kind_of_step
from mnist_dist.training.steps.ahead import Ahead
from mnist_dist.training.steps.fused import FusedStep

WORKER, COMPILER = (ROOT / "tests" / "helpers" / name for name in ("fused_worker.py", "triton_on_cpu.py"))
ROUNDING = 2.0  # times the distance of the plain step in float32 from float64, and one last bit: the bound of agreement


def in_worker(*words, cwd, **environment):
    """A process with Triton's interpreter; Triton cannot be imported twice."""
    return run([sys.executable, "-W", "ignore", WORKER, *words], cwd=cwd, PYTHONPATH=str(ROOT), **environment)


def compared(cwd, **options):
    defaults = {"hidden": 16, "programs": 0, "rows": 128, "cut": 16, "epochs": 2, "lr": 1e-3}
    done = in_worker("compare", json.dumps({**defaults, **options}), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_agrees(outcome, steps):
    (weights, plain_weights), (losses, plain_losses) = outcome["weights"], outcome["losses"]
    assert weights <= ROUNDING * plain_weights + 2e-7 and losses <= ROUNDING * plain_losses + 2e-7, outcome
    assert outcome["steps"] == 3 * [[steps]]


def test_it_agrees_with_the_plain_step_and_a_launch_may_end_anywhere(tmp_path):
    first, second = (compared(tmp_path, images_of=50, batch_size=7, cut=cut) for cut in (16, 3))
    assert_agrees(first, 16)
    assert first == second, "the same bits"


OPTIONS = [
    {"images_of": 97, "batch_size": 40, "hidden": 48, "programs": 5, "rows": 16},
    {"images_of": 230, "batch_size": 97, "epochs": 3},
    {"images_of": 12, "batch_size": 1, "epochs": 3},
    {"images_of": 50, "batch_size": 20, "gradient_accumulation_steps": 3},
    {"images_of": 430, "batch_size": 200, "epochs": 3},
    {"images_of": 600, "batch_size": 512, "epochs": 3},
    {"images_of": 97, "batch_size": 200, "shuffle": False},
    {"images_of": 70, "batch_size": 64, "hidden": 512, "epochs": 1},
]


@pytest.mark.parametrize("options", [pytest.param(options, marks=pytest.mark.long if number < 1 else pytest.mark.faults)
                                     for number, options in enumerate(OPTIONS)], ids=str)
def test_agreement(options, tmp_path):
    """Fewer programs than tiles, several blocks of rows, a short last batch, and a batch with all images."""
    outcome = compared(tmp_path, **options)
    print(f"{options}: weights {outcome['weights'][0]:.1e} (plain {outcome['weights'][1]:.1e}), losses "
          f"{outcome['losses'][0]:.1e} (plain {outcome['losses'][1]:.1e})")
    assert_agrees(outcome, options.get("epochs", 2) * -(-options["images_of"] // options["batch_size"]))


WORDS = ["--batch-size", 97, "--lr", "1e-3", "--wandb", "disabled", "--evaluate-every", "400samples"]


@pytest.mark.long
def test_a_run_that_was_cut_has_the_same_bits_and_without_a_gpu_it_says_that_they_differ(small_dir, tmp_path):
    def train(name, *words, **environment):
        done = in_worker("train", "--data-dir", small_dir, "--output-dir", name, *WORDS, *words, cwd=tmp_path,
                         **environment)
        assert done.returncode == 0, done.stderr
        return done

    train("once", "--compile", "fused", "--epochs", 2)
    train("cut", "--compile", "fused", "--max-steps", 7)
    subprocess.run(["cp", "-r", "cut", "plain"], cwd=tmp_path, check=True)
    train("cut", "--epochs", 2, "--resume")
    once, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "cut"))
    assert all(torch.equal(once[name], cut[name]) for name in once)
    assert result_of(tmp_path / "cut")["environment"]["step"] == "fused"
    assert len(result_of(tmp_path / "once")["epochs"][1]["evaluations"]) == 2
    done = train("plain", "--epochs", 2, "--resume", HAS_GPU="no")
    assert ("the run had the fused step, which needs a GPU, and this run is on the CPU: it goes on with the plain "
            "step, and the bits differ from here on") in done.stderr
    assert result_of(tmp_path / "plain")["environment"]["step"] == "plain"


def step_of(batch, *, units=256, multiprocessors=132):
    """A step that has cut its work for a GPU, and no memory."""
    step = object.__new__(FusedStep)
    from mnist_dist.training.steps import fused_kernels

    step.kernels, step.device = fused_kernels, torch.device("meta")
    step.batches = SimpleNamespace(count=lambda number: batch, num_samples=60_000, num_batches=-(-60_000 // batch))
    step.options = {"betas": (0.9, 0.999), "eps": 1e-8}
    step._multiprocessors = lambda: multiprocessors
    step._allocate(units)
    return step


GPUS = [(90, 200, 256, 132, 128), (86, 200, 256, 24, 128), (90, 1, 256, 132, 64), (90, 32, 256, 132, 64),
        (90, 8192, 256, 132, 128), (80, 200, 256, 108, 128), (90, 200, 512, 132, 1024)]


@pytest.mark.parametrize("gpu", [pytest.param(gpu, marks=pytest.mark.long if number < 1 else pytest.mark.faults)
                                 for number, gpu in enumerate(GPUS)])
def test_it_compiles_for_gpus(gpu, tmp_path):
    """Registers that do not fit are in the stack: its bytes per thread."""
    capability, batch, units, multiprocessors, stack = gpu
    step = step_of(batch, units=units, multiprocessors=multiprocessors)
    words = [json.dumps(step.constants), capability, step.warps, tmp_path / "code"]
    done = run([sys.executable, "-W", "ignore", COMPILER, *words], cwd=tmp_path, PYTHONPATH=str(ROOT),
               TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    tool, shared = done.stdout.split()
    usage = run([tool, "--dump-resource-usage", tmp_path / "code"], cwd=tmp_path)
    registers, stacked = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    print(f"sm_{capability}, batch {batch}, {units} units, {step.programs} programs of {32 * step.warps} threads: "
          f"{registers} registers, {stacked} bytes of stack, {int(shared) // 1024} KiB shared")
    assert stacked <= stack and int(shared) <= 99 * 1024, "what every GPU from 8.0 on has"


def test_the_work_is_cut_for_the_gpu():
    large, small = step_of(200), step_of(200, multiprocessors=24)
    assert (large.programs, large.constants["IS_RESIDENT"], large.constants["KEEPS_PIXELS"]) == (112, True, False)
    assert (small.programs, small.constants["IS_RESIDENT"]) == (24, False)
    assert step_of(1).constants["KEEPS_PIXELS"] and step_of(1).constants["R"] == 16
    assert step_of(5, units=48).constants["H_PADDED"] == 64
    assert fused.UNITS == large.kernels.UNITS, "which is read without Triton"


def test_a_launch_is_as_long_as_its_seconds(monkeypatch):
    class Event:
        milliseconds = 0.0

        def query(self):
            return True

        def elapsed_time(self, other):
            return other.milliseconds

    step = step_of(1)
    step.length, step._timed = 16, None
    assert step._next_length() == 16, "nothing is known"
    for milliseconds, length in ((0.16, 32), (0.32, 64), (64.0, 100), (10.0, 200), (4000.0, 5), (1e6, 1)):
        end = Event()
        end.milliseconds, step._timed = milliseconds, (Event(), end, step.length)
        end.milliseconds = milliseconds
        before = step.length
        assert step._next_length() == min(2 * before, max(1, int(100 * before / milliseconds))), (milliseconds, length)


def test_the_next_epoch_is_made_in_a_thread():
    made = []

    def make(epoch):
        made.append((epoch, threading.current_thread() is threading.main_thread()))
        return 10 * epoch

    ahead = Ahead(make)
    assert [ahead.of(epoch) for epoch in (3, 4, 5, 9)] == [30, 40, 50, 90]
    assert ahead._next[1].result() == 100
    assert sorted(made) == [(3, True), (4, False), (5, False), (6, False), (9, True), (10, False)]


def parts_of(*, size=1, device="cuda", dtype=torch.float32, precision="no", noise=False, sizes=(784, 256, 10),
             batch=200, images=60_000):
    team = SimpleNamespace(size=size, device=torch.device(device),
                           accelerator=SimpleNamespace(mixed_precision=precision))
    batches = SimpleNamespace(count=lambda step: batch, num_samples=images, num_batches=300)
    return SimpleNamespace(team=team, dtype=dtype, measures_noise=noise, module=SimpleNamespace(sizes=sizes),
                           batches=batches)


REASONS = {
    "needs one process, and there are 2": {"size": 2},
    "needs a GPU, and this run is on the CPU": {"device": "cpu"},
    "needs float32, got float64": {"dtype": torch.float64},
    "needs no mixed precision, got bf16": {"precision": "bf16"},
    "has no --noise-scale": {"noise": True},
    "needs one hidden layer of at most 512 units, a multiple of 16": {"sizes": (784, 100, 10)},
    "needs a batch of at most 16,384, got 16,385": {"batch": 16_385},
    "needs at most 2,000,000 images": {"images": 2_000_001},
    "needs an NVIDIA GPU of compute capability 8.0 or newer": {},
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_it_cannot_be_taken(reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    parts = parts_of(**REASONS[reason])
    assert fused.why_not(parts) == reason
    with pytest.raises(UserError, match=f"^--compile fused {reason}: give --compile on, off or auto$"):
        kind_of_step(TrainConfig(compile="fused"), parts)
    with pytest.raises(UserError):
        kind_of_step(TrainConfig(compile="fused"), parts, "plain")
    assert kind_of_step(TrainConfig(compile="fused"), parts, "fused") == "plain", "a run that is continued"
    assert kind_of_step(TrainConfig(), parts, "fused") == "plain"


@pytest.mark.parametrize(("options", "kind", "capability", "is_said"), [
    ({}, "plain", (9, 0), True), ({}, "plain", (7, 5), False), ({}, "compiled", (9, 0), False),
    ({"compile": "off"}, "plain", (9, 0), False), ({"local_sgd_steps": 2}, "plain", (9, 0), False),
    ({"reproducible": True}, "exact", (9, 0), False),
])
def test_a_run_on_a_gpu_names_it(options, kind, capability, is_said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(run_module, "replace", lambda environment, **values: environment)
    said = []
    trainer = SimpleNamespace(kind=kind, parts=parts_of(), make_step=lambda warn, was_compiled: None,
                              step=SimpleNamespace(kind=kind, compile_seconds=0.0))
    console = SimpleNamespace(say=said.append, warn=said.append)
    Run._make_step(SimpleNamespace(trainer=trainer, console=console, config=TrainConfig(**options), environment=None),
                   was_compiled=False)
    assert ("--compile fused" in "".join(said)) == is_said


def test_a_run_that_is_refused_leaves_no_folder(small_dir, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        assert run_here(["train", "--compile", "fused", "--data-dir", str(small_dir), "--wandb", "disabled",
                         "--output-dir", str(tmp_path / name)]) == 2
        assert "--compile fused needs a GPU" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list((tmp_path / "there").iterdir())


def test_a_run_that_is_continued_keeps_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fused.why_not(parts_of()) is None
    assert kind_of_step(TrainConfig(), parts_of(), "fused") == "fused"
    assert kind_of_step(TrainConfig(compile="off"), parts_of(), "fused") == "plain"
    assert fused.why_not(parts_of(sizes=(784, 512, 10))) is None
    assert fused.why_not(parts_of(sizes=(784, 256, 256, 10))) is not None
