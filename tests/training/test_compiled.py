"""The step as compiled functions: when it is chosen, what it leaves alone, and that it is the plain step but for speed.

That it agrees with plain PyTorch to 1e-10 on 1, 2 and 3 processes is in test_exactness.py.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from support import ROOT, assert_one_line_error, mnist_dist, mnist_dist_launched, result_of, run, threads

from mnist_dist.config import TrainConfig
from mnist_dist.data import load
from mnist_dist.errors import UserError
from mnist_dist.processes.core_contention import one_thread
from mnist_dist.processes.team import Team
from mnist_dist.record.environment import processor_family
from mnist_dist.record.gains import Gain, keep_gain
from mnist_dist.training.steps import WORTH_COMPILING_STEPS, compiled, cpu_products, kind_of_step
from mnist_dist.training.steps.compiled import CompiledStep
from mnist_dist.training.steps.graph_pass import GraphPass
from mnist_dist.training.steps.inductor import compiler_failure
from mnist_dist.training.trainer import Trainer

LINEAR = "layers.1.weight"


def wanted(num_batches, *, device="cpu", precision="no", before=None, **options):
    team = SimpleNamespace(device=torch.device(device), accelerator=SimpleNamespace(mixed_precision=precision),
                           run_on=lambda where, task: task())
    parts = SimpleNamespace(team=team, batches=SimpleNamespace(num_batches=num_batches))
    return kind_of_step(TrainConfig(**options), parts, before) == "compiled"


def test_auto_compiles_where_the_run_has_steps_enough():
    assert wanted(WORTH_COMPILING_STEPS, epochs=1) and wanted(WORTH_COMPILING_STEPS // 20, epochs=20)
    assert not wanted(WORTH_COMPILING_STEPS - 1, epochs=1)
    assert not wanted(60_000, max_steps=100)
    assert not wanted(60_000, precision="fp16")


def test_auto_on_a_gpu_needs_what_was_measured_on_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert not wanted(60_000, device="cuda"), "nothing is known"
    keep_gain("A100", Gain(1.0, 1e-3, "2"))
    assert not wanted(60_000, device="cuda"), "of another kind"
    keep_gain("H100", Gain(10.0, 1e-3, "2"))
    assert wanted(10_001, device="cuda", epochs=1) and not wanted(10_000, device="cuda", epochs=1)
    assert not wanted(60_000, device="cuda", precision="fp16")
    assert not wanted(60_000, device="cuda", before="plain") and wanted(1, device="cuda", before="compiled")


def test_a_continued_run_keeps_its_kind_of_step():
    assert wanted(1, before="compiled") and not wanted(60_000, before="plain")
    assert not wanted(60_000, before="compiled", compile="off") and wanted(1, before="plain", compile="on")
    assert not wanted(60_000, before="compiled", gradient_compression="bf16")


@pytest.mark.parametrize("options", [
    {"reproducible": True}, {"mixed_precision": "fp16"}, {"gradient_compression": "bf16"}, {"local_sgd_steps": 2},
])
def test_auto_leaves_alone_what_needs_the_plain_step(options):
    assert not wanted(60_000, **options)
    with pytest.raises(UserError, match="exclude each other"):
        TrainConfig(compile="on", **options)


def test_on_and_off_are_obeyed_or_refused():
    assert wanted(1, compile="on") and wanted(1, compile="on", device="cuda") and not wanted(60_000, compile="off")
    with pytest.raises(UserError, match="exclude each other"):
        wanted(1, compile="on", precision="fp16")


def trained(folder, data_dir, name, *words, status=0, **environment):
    run_it = mnist_dist_launched if environment else mnist_dist
    done = run_it("train", "--data-dir", data_dir, "--batch-size", 97, "--lr", "1e-3", "--wandb", "disabled",
                  "--output-dir", name, *words, cwd=folder, **environment)
    assert done.returncode == status, done.stderr
    return done


def test_a_bug_is_not_taken_for_a_missing_compiler():
    """torch wraps what it catches, so the causes count."""
    from torch._inductor.exc import InvalidCxxCompiler

    def wrapped(cause):
        error = RuntimeError("the backend failed")
        error.__cause__ = cause
        return error

    assert "install a C++ compiler" in compiler_failure(wrapped(InvalidCxxCompiler()))
    assert "cache can be written" in compiler_failure(wrapped(PermissionError("no")))
    for bug in (TypeError("ours"), wrapped(AttributeError("ours")), RuntimeError("shapes do not fit")):
        assert compiler_failure(bug) is None


def after_three_steps(small_dir, kind, *, dtype="float64", others_are_there=False, **options):
    config = TrainConfig(dtype=dtype, compile=kind, **options)
    trainer = Trainer(config, Team(Accelerator(cpu=True), 60), load("mnist", str(small_dir)))
    trainer.make_step()
    trainer.contention.active = others_are_there
    steps = min(3, trainer.step.batches.num_batches)
    trainer.step.begin(0, range(steps))
    for step in range(steps):
        trainer.step.take(range(step, step + 1))
    trainer.step.flush(steps)
    return trainer


def assert_same(*trainers):
    found = [[trainer.sums[0], trainer.sums[:, 0], *trainer.module.parameters()] for trainer in trainers]
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("batch_size", "passes", "parts"), [
    pytest.param(401, 2, 10, marks=pytest.mark.long), pytest.param(1, 1, 1, marks=pytest.mark.long),
    pytest.param(2, 2, 2, marks=pytest.mark.faults)])
def test_very_large_and_very_small_batches(batch_size, passes, parts, small_dir, monkeypatch):
    """Two passes of 201 samples in five parts each, of which the last batch, of 207, fills three; or single samples."""
    monkeypatch.setattr(compiled, "PART", 40)
    both = [after_three_steps(small_dir, kind, batch_size=batch_size, gradient_accumulation_steps=passes,
                              noise_scale=True) for kind in ("on", "off")]
    assert both[0].step.parts == parts
    assert_same(*both)


@pytest.mark.parametrize(("batch_size", "number", "wanted_counts"), [
    # the first weight's, and the gradient of the second, in two blocks
    pytest.param(97, 2, {"bmm": 3, "mm": 0, "addmm": 0}, marks=pytest.mark.long),
    pytest.param(600, 2, {"bmm": 0, "mm": 2, "addmm": 1}, marks=pytest.mark.faults),  # the others: inductor's own loops
    pytest.param(2, 2, {"bmm": 1, "mm": 0, "addmm": 0}, marks=pytest.mark.faults),  # the first activations
    pytest.param(1, 2, {"bmm": 0, "mm": 0, "addmm": 0}, marks=pytest.mark.faults),
    pytest.param(97, 1, {"bmm": 0, "mm": 3, "addmm": 2}, marks=pytest.mark.faults),  # one thread: the graph as it was
])
def test_products_fit_adams_loop_which_divides_once_for_a_weight(batch_size, number, wanted_counts, small_dir,
                                                                 monkeypatch):
    counted = {}

    def count(self, graph):
        def divided_roots():
            divisions = graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor)
            return sum(node.args[0].target == torch.ops.aten.sqrt.default for node in divisions)

        assert divided_roots() == 4, "one for each tensor"
        whole(self, graph)
        assert divided_roots() == 0
        counted.update({name: len(graph.find_nodes(op="call_function", target=getattr(torch.ops.aten, name).default))
                       for name in wanted_counts})

    whole = GraphPass.__call__
    monkeypatch.setattr(GraphPass, "__call__", count)
    monkeypatch.setattr(GraphPass, "uuid", lambda self: os.urandom(32))  # nothing is counted in the cache
    with threads(number):
        both = [after_three_steps(small_dir, kind, batch_size=batch_size) for kind in ("on", "off")]
    assert counted == wanted_counts
    assert_same(*both)


@pytest.fixture
def two_threads():
    with threads(2):
        yield


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.faults),
                                        pytest.param(97, marks=pytest.mark.long)])
def test_beside_a_busy_process_it_has_the_same_bits_with_one_thread(batch_size, small_dir, two_threads, monkeypatch):
    """Of PyTorch's own products. oneDNN shares its products out by the number of threads: the next test."""
    monkeypatch.setattr(cpu_products, "ONEDNN_FROM", {})
    entered = []

    @contextmanager
    def counted():
        with one_thread():
            entered.append(1)
            yield

    monkeypatch.setattr(compiled, "one_thread", counted)
    alone, beside = (after_three_steps(small_dir, "on", dtype="float32", batch_size=batch_size, others_are_there=there)
                     for there in (False, True))
    assert len(entered) == 4, "it is tried, then there are three steps"
    assert torch.equal(alone.sums, beside.sums)
    assert all(map(torch.equal, alone.module.parameters(), beside.module.parameters()))


@pytest.mark.long
def test_where_one_thread_gives_other_bits_all_threads_are_taken(small_dir, two_threads, monkeypatch):
    entered, made = [], []

    @contextmanager
    def other_bits():
        yield
        entered.append(1)
        made[0].state["exp_avg"][2][0, 0] *= 1 + 1e-15

    def remember(self, parts, whole=CompiledStep.__init__):
        made[:] = [self]
        whole(self, parts)

    monkeypatch.setattr(cpu_products, "ONEDNN_FROM", {})
    monkeypatch.setattr(CompiledStep, "__init__", remember)
    monkeypatch.setattr(compiled, "one_thread", other_bits)
    alone, beside = (after_three_steps(small_dir, "on", batch_size=97, others_are_there=there)
                     for there in (False, True))
    assert len(entered) == 1, "it is tried, and its weights are forgotten"
    assert all(map(torch.equal, alone.module.parameters(), beside.module.parameters()))


@pytest.mark.skipif(not cpu_products.has_onednn(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize(("least", "wanted_count"), [
    pytest.param(97 * 784 * 256, 2, marks=pytest.mark.long), pytest.param(1, 5, marks=pytest.mark.faults)])
def test_large_products_are_onednns(least, wanted_count, small_dir, two_threads, monkeypatch):
    """Of the first layer, or all of a step; the same training but for rounding, and for other products than MKL's."""
    counted = []

    def count(self, graph):
        whole(self, graph)
        counted.append(len(graph.find_nodes(op="call_function", target=torch.ops.mnist_dist.product.default)))

    whole = GraphPass.__call__
    monkeypatch.setattr(GraphPass, "__call__", count)
    monkeypatch.setattr(GraphPass, "uuid", lambda self: os.urandom(32))  # nothing is found in the cache
    trainers = []
    for rule in ({}, {"compiled": least}):
        monkeypatch.setattr(cpu_products, "ONEDNN_FROM", {processor_family(): rule})
        trainers.append(after_three_steps(small_dir, "on", dtype="float32", batch_size=97))
    assert counted == [0, wanted_count]
    mkl, onednn = (torch.cat([weight.flatten() for weight in trainer.module.parameters()]) for trainer in trainers)
    assert not torch.equal(mkl, onednn)
    torch.testing.assert_close(mkl, onednn, rtol=0, atol=2e-4)  # of three steps of 1e-4
    torch.testing.assert_close(trainers[0].sums, trainers[1].sums, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_beside_a_busy_process_products_of_onednn_have_the_same_bits(small_dir, two_threads, monkeypatch):
    monkeypatch.setattr(cpu_products, "ONEDNN_FROM", {processor_family(): {"compiled": 1}})
    alone, beside = (after_three_steps(small_dir, "on", dtype="float32", batch_size=97, others_are_there=there)
                     for there in (False, True))
    assert torch.equal(alone.sums, beside.sums)
    assert all(map(torch.equal, alone.module.parameters(), beside.module.parameters()))


@pytest.mark.long
def test_cut_and_continued_it_has_the_same_bits(small_dir, tmp_path):
    trained(tmp_path, small_dir, "whole", "--epochs", 2, "--compile", "on")
    trained(tmp_path, small_dir, "cut", "--max-steps", 17, "--compile", "on", "--checkpoint-every", "5steps")
    trained(tmp_path, small_dir, "cut", "--epochs", 2, "--compile", "on", "--resume")
    trained(tmp_path, small_dir, "plain", "--epochs", 2, "--compile", "off")
    weights = {name: load_file(tmp_path / name / "model.safetensors")[LINEAR] for name in ("whole", "cut", "plain")}
    assert torch.equal(weights["cut"], weights["whole"])
    assert torch.allclose(weights["whole"], weights["plain"], atol=2e-3)  # float32: rounding, amplified by Adam
    whole, plain = result_of(tmp_path / "whole"), result_of(tmp_path / "plain")
    assert (whole["environment"]["step"], plain["environment"]["step"]) == ("compiled", "plain")
    assert whole["summary"]["compile_seconds"] > 0 == plain["summary"]["compile_seconds"]
    for ours, theirs in zip(whole["epochs"], plain["epochs"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert ours["test_nll_sum"] == pytest.approx(theirs["test_nll_sum"], rel=1e-3)
        assert 0 <= ours["data_wait_fraction"] < 1


@pytest.mark.faults
def test_bf16_is_compiled_too(small_dir, tmp_path):
    for compile in ("on", "off"):
        trained(tmp_path, small_dir, compile, "--epochs", 2, "--mixed-precision", "bf16", "--compile", compile)
    compiled, plain = (result_of(tmp_path / name) for name in ("on", "off"))
    assert compiled["environment"]["mixed_precision"] == "bf16" and compiled["environment"]["step"] == "compiled"
    assert compiled["epochs"][-1]["test_nll"] == pytest.approx(plain["epochs"][-1]["test_nll"], rel=0.05)


@pytest.mark.long
def test_without_a_compiler_auto_goes_on_and_on_says_so(small_dir, tmp_path):
    broken = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = trained(tmp_path, small_dir, "on", "--compile", "on", status=2, **broken)
    assert_one_line_error(done, "could not be compiled", "--compile off")
    # steps enough for auto, and a target that ends the run after its first epoch
    done = trained(tmp_path, small_dir, "auto", "--epochs", 2000, "--target-nll", 20, **broken)
    assert "continuing with the plain step" in done.stderr
    result = result_of(tmp_path / "auto")
    assert result["environment"]["step"] == "plain" and len(result["epochs"]) == 1


@pytest.mark.faults
def test_a_compiler_older_than_the_processor_and_code_in_the_users_cache(small_dir, tmp_path):
    """The compiler refuses the widest vectors: then inductor tries what it knows."""
    compiler = tmp_path / "c++"
    compiler.write_text(f"""#!/bin/sh
case "$*" in *avx512*|*amx*) echo "$*" >> {tmp_path}/refused; exit 1;; esac
exec g++ "$@"
""")
    compiler.chmod(0o755)
    trained(tmp_path, small_dir, "on", "--compile", "on", CXX=str(compiler), TORCHINDUCTOR_CACHE_DIR="",
            XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert result_of(tmp_path / "on")["environment"]["step"] == "compiled"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert (tmp_path / "refused").exists() == ("avx512f" in flags)
    (kind,) = (tmp_path / "cache" / "mnist_dist" / "compiled").iterdir()
    assert list(kind.rglob("*.so")) and not (tmp_path / "torchinductor_root").exists()


@pytest.mark.faults
def test_an_empty_batch_moves_nothing(small_dir, tmp_path):
    """What fills up a short batch weighs nothing: a step of it alone leaves weights, moments and losses as they are."""
    script = tmp_path / "empty.py"
    script.write_text(f"""
import torch
from mnist_dist.processes.launch_environment import read_launch
from mnist_dist.processes.team import join
from mnist_dist.config import TrainConfig
from mnist_dist.data import load
from mnist_dist.training.trainer import Trainer
sets = load("mnist", {str(small_dir)!r})
trainer = Trainer(TrainConfig(batch_size=97, compile="on"), join(read_launch(), timeout_s=60), sets)
trainer.make_step()
before = {{name: tensor.clone() for name, tensor in trainer.tensors().items()}}
step = trainer.step
step.begin(0, range(11))
step.rows = [torch.full_like(row, -1) for row in step.rows]
step.take(range(1))
step.flush(1)
for name, tensor in trainer.tensors().items():
    moved = 1.0 if name.endswith(".step") else 0.0
    assert torch.equal(tensor, before[name] + moved), name
print("as it was")
""")
    done = run([sys.executable, script], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "as it was" in done.stdout, done.stderr


@pytest.mark.cuda
def test_on_a_gpu_the_recorded_step_is_the_plain_one(small_dir, tmp_path):
    for compile in ("on", "off"):
        trained(tmp_path, small_dir, compile, "--epochs", 2, "--dtype", "float64", "--compile", compile)
    compiled, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("on", "off"))
    assert max((compiled[name] - plain[name]).abs().max().item() for name in plain) < 1e-10
    assert result_of(tmp_path / "on")["environment"]["device"] == "cuda"
