"""On fake CUDA tensors, which have a device and no content: nothing in a step mixes devices or goes to the host.

What the fake world cannot do is stood in for: streams, graphs, autograd's engine, and DataLoader's iterator.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from planted_faults import FAULTS
from support import ROOT, take_steps
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mnist_dist.config import Every, TrainConfig
from mnist_dist.data import Images, ImageSets
from mnist_dist.processes.team import Team
from mnist_dist.stopwatch import Stopwatch
from mnist_dist.training import trainer as trainer_module
from mnist_dist.training.device_events import DeviceMarks
from mnist_dist.training.pauses import PauseSchedule
from mnist_dist.training.sampling import GlobalBatchSampler
from mnist_dist.training.steps import compiled, plain
from mnist_dist.training.trainer import Trainer

CUDA = torch.device("cuda", 0)
ORDER = ("aten._to_copy.default", torch.int64)  # once per epoch, outside of the steps


class Crossings(TorchDispatchMode):
    """Notes the operations that have tensors on two devices: the fake world lets copies pass."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.found.append((str(operation), tensors[0].dtype))
        return result


class Loader:
    """DataLoader's own iterator reads a random number back, which a fake tensor refuses."""

    def __init__(self, images, batches):
        self.images, self.batch_sampler = images, batches

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        return map(self.images.__getitems__, self.batch_sampler)


class Event:
    """The device has come to it at once; 3 ms pass between two."""

    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 3.0


def outside(function):
    """`function` with real tensors."""
    def call(*arguments, **options):
        with unset_fake_temporarily():
            return function(*arguments, **options)
    return call


def accelerator_on(device, holder):
    """Accelerate's part of a run on one GPU."""
    def prepare(optimizer):
        optimizer.optimizer = optimizer
        return optimizer

    def backward(loss):
        assert loss.device == device
        for weight in holder[0].module.parameters():
            weight.grad = torch.zeros_like(weight)

    return SimpleNamespace(
        device=device, num_processes=1, process_index=0, is_main_process=True, is_local_main_process=True,
        mixed_precision="no", scaler=None, distributed_type=DistributedType.NO, prepare_optimizer=prepare,
        backward=backward, sync_gradients=True, accumulate=lambda model: nullcontext(),
        no_sync=lambda model: nullcontext(), prepare_model=lambda model, evaluation_mode: model)


@pytest.fixture
def make_trainer(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    done = []

    @contextmanager
    def recorded(graph):
        yield
        done.append("recorded")

    def graph():
        return SimpleNamespace(reset=lambda: None)

    for owner, name, stub in [
        (torch.cuda, "Stream", lambda: stream), (torch.cuda, "current_stream", lambda: stream),
        (torch.cuda, "stream", nullcontext), (torch.cuda, "graph", recorded), (torch.cuda, "CUDAGraph", graph),
        (torch.cuda, "Event", Event), (torch.cuda, "reset_peak_memory_stats", lambda: done.append("forget the peak")),
        (torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34)),
        (trainer_module, "make_loader", Loader), (plain, "make_loader", Loader),
        (trainer_module, "MLP", outside(trainer_module.MLP)),
        (GlobalBatchSampler, "order", outside(GlobalBatchSampler.order)),
        (GlobalBatchSampler, "rows", outside(GlobalBatchSampler.rows)),
        (compiled, "compile_once", lambda function, *varying, **options: lambda *arguments: [
            found for found in [function(*arguments)] if found is not None]),
        # autograd's engine asks for a real device: gradients are zeros of the weights' shapes
        (compiled, "grad_and_value", lambda f, has_aux: lambda both: (tree_map(lambda x: x * 0, both), f(both))),
        (torch.autograd, "grad", lambda loss, weights: [torch.zeros_like(weight) for weight in weights]),
    ]:
        monkeypatch.setattr(owner, name, stub)

    def make(**options):
        holder = []
        team = Team(accelerator_on(CUDA, holder), 300.0)
        data = Images(torch.zeros(101, 1, 28, 28, dtype=torch.uint8), torch.zeros(101, dtype=torch.int64))
        trainer = Trainer(TrainConfig(batch_size=20, shuffle=False, **options), team, ImageSets("fake", data, data))
        holder.append(trainer)
        trainer.make_step()
        if trainer.step.kind == "compiled":
            trainer.step.graph.replay = trainer.step._step_at_cursor
            assert done == ["recorded", "forget the peak"], "the compiler's memory is not the training's"
        return trainer

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield make


@pytest.mark.parametrize(("kind", "options"), [
    ("plain", {"compile": "off"}), ("plain", {"compile": "off", "gradient_accumulation_steps": 3}),
    ("plain", {"compile": "off", "dtype": "float64"}), ("exact", {"compile": "off", "reproducible": True}),
    ("compiled", {"compile": "on"}), ("compiled", {"compile": "on", "dtype": "float64",
                                                   "gradient_accumulation_steps": 3}),
    ("plain", {"compile": "off", "noise_scale": True}), ("compiled", {"compile": "on", "noise_scale": True}),
])
def test_everything_stays_on_the_device(kind, options, make_trainer, monkeypatch):
    trainer = make_trainer(**options)
    assert trainer.step.kind == kind
    watch = Stopwatch(lambda: None, marks=DeviceMarks(trainer.team.wait_for))
    schedule = PauseSchedule(Every(0, "epochs"), trainer.batches.num_batches, trainer.team)
    with Crossings() as crossings:
        take_steps(trainer, 0, range(6), watch, schedule)
    copied_order = [] if kind == "compiled" else [ORDER]  # the compiled step copies it into a tensor that is there
    assert [found for found in crossings.found if found[0] != "aten.copy_.default"] == copied_order
    assert len(crossings.found) == 1, crossings.found
    assert {tensor.device for tensor in trainer.tensors().values()} == {CUDA}
    monkeypatch.setattr(trainer_module, "add_in_order", lambda rows: SimpleNamespace(tolist=lambda: [0.0, 0.0, 101.0]))
    with Crossings() as crossings:
        trainer.evaluate()
    assert crossings.found == [ORDER]


def test_step_times_are_the_devices(make_trainer, monkeypatch):
    monkeypatch.setattr(DeviceMarks, "every", 2)
    trainer = make_trainer(compile="on")
    watch = Stopwatch(lambda: None, marks=DeviceMarks(trainer.team.wait_for))
    take_steps(trainer, 0, range(6), watch, PauseSchedule(Every(0, "epochs"), 6, trainer.team))
    # a window of one step of warm-up, and one of five: 2, 2 and 1 steps between events
    assert watch.step_seconds == pytest.approx([0.0015] * 4 + [0.003])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_has_its_place(fault):
    """planted_faults.py is run by hand: what it replaces is there, once, and its tests are."""
    assert (ROOT / "mnist_dist" / fault.file).read_text().count(fault.text) == 1 and (ROOT / fault.tests).exists()
