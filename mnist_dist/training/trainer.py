"""The model, its optimizer and its data on this rank: the step loop and the evaluation.

The k-th step averages the gradient over the k-th global batch, whatever the number of ranks and passes. Nothing in the
loop waits for the device: sums stay there until an epoch ends or a checkpoint is due. It knows nothing of files.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mnist_dist.config import TrainConfig
from mnist_dist.data import ImageSets, scale
from mnist_dist.errors import Diverged
from mnist_dist.processes.core_contention import CoreContention
from mnist_dist.processes.team import Team
from mnist_dist.stopwatch import Stopwatch, Window
from mnist_dist.training.evaluation import add_in_order, batch_sums, metrics_of_test
from mnist_dist.training.model import MLP
from mnist_dist.training.noise_scale import NOT_KNOWN, noise_scale
from mnist_dist.training.pauses import PauseSchedule
from mnist_dist.training.sampling import make_loader, share_out
from mnist_dist.training.steps import cpu_products, kind_of_step, make_step, reproducible
from mnist_dist.training.steps.fused import why_not
from mnist_dist.training.steps.step import StepParts

WARMUP_STEPS = 5  # the first steps of a process allocate and tune, so they are timed separately
EVALUATION_BATCH = 1000  # images per rank: bounds memory, changes no result


class Adam(torch.optim.Adam):
    """PyTorch's Adam, without the decorators that make each start import PyTorch's compiler, which takes a second. They
    keep the compiler out of these functions; our compiled step does not call them (compiled.py).
    """

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class Trainer:
    """Everything that a step needs, the step itself after `make_step`, and the loop over steps.

    `before` is the state in the checkpoint from which a run is continued.
    """

    def __init__(self, config: TrainConfig, team: Team, sets: ImageSets, before: Mapping[str, Any] | None = None
                 ) -> None:
        accelerator = team.accelerator
        self.config, self.team, self.sets = config, team, sets
        accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
        self.global_batch_size = config.global_batch_size(team.size)
        self.learning_rate = config.learning_rate(self.global_batch_size)
        self.dtype = getattr(torch, config.dtype)
        train, test = sets.train.to(team.device), sets.test.to(team.device)
        self.batches = share_out(train, self.global_batch_size, rank=team.rank, size=team.size, shuffle=config.shuffle,
                                 seed=config.seed, passes=config.gradient_accumulation_steps)
        self.test_batches = share_out(test, EVALUATION_BATCH * team.size, rank=team.rank, size=team.size)
        self.test_loader = make_loader(test, self.test_batches)
        torch.manual_seed(config.seed)
        # drawn in float32 and then widened: float32 and float64 runs start from the same weights
        self.module = MLP()
        if config.reproducible:
            reproducible.draw_weights(self.module, config.seed)
        self.module.to(team.device, self.dtype)
        self.sums = torch.zeros(3, self.batches.num_batches, dtype=torch.float64, device=team.device)
        self.noise = NOT_KNOWN  # as of the last `train_loss`
        self.losses: list[float] = []  # of the last `train_loss`: each step's sum, up to one that is not finite
        # fused also if the step is compiled: it decides on which device Adam's step counts are
        self.optimizer = accelerator.prepare_optimizer(
            Adam(self.module.parameters(), lr=self.learning_rate, fused=True)
        )
        self._start_adam()
        self.contention = CoreContention(on_cpu=team.device.type == "cpu")
        self.parts = StepParts(team, self.module, self.optimizer, train, self.batches, self.sums, self.dtype,
                               self.contention, self._measures_noise())
        self.kind_before = before.get("kind") if before else None
        self.kind = kind_of_step(config, self.parts, self.kind_before)
        self.onednn_from = self._products(before)
        if self.onednn_from is not None:
            self.parts = replace(self.parts, onednn_from=self.onednn_from)
            for layer in self.module.linears:
                layer.function = partial(cpu_products.linear, least=self.onednn_from)
        # of an epoch with few steps, at most a quarter is warm-up, so that something is left to measure
        self._warm_left = min(WARMUP_STEPS, self.batches.num_batches // 4)
        self._clock = ExitStack()  # holds the open window
        self._window: Window | None = None
        self._is_taking = False

    @property
    def sign(self) -> object:
        """For the watchdog: while steps are taken, what changes with each step and while this rank waits; else None."""
        window = self._window
        return (len(window.samples), self.team.signs) if self._is_taking and window else None

    def _products(self, before: Mapping[str, Any] | None) -> int | None:
        """The least multiplications of a matrix product that is oneDNN's; None if none is. A run that is continued
        keeps what it had `before`, and all ranks take what the main one has, because the bits depend on it. Collective.
        """
        team = self.team
        if (team.device.type != "cpu" or self.dtype != torch.float32 or team.accelerator.mixed_precision != "no"
                or self.config.reproducible):
            return None
        least = (team.run_on("main", lambda: cpu_products.onednn_from(self.kind)) if before is None
                 else before.get("onednn_from"))
        return least if isinstance(least, int) and all(team.share(cpu_products.has_onednn())) else None

    def _measures_noise(self) -> bool:
        """Whether the noise scale is wanted and possible. fp16 scales gradients; Local SGD has one for each rank."""
        config, precision = self.config, self.team.accelerator.mixed_precision
        return (config.noise_scale and not config.reproducible and config.local_sgd_steps == 1 and precision != "fp16"
                and self.batches.count(0) > 1)

    @property
    def per_device_batch_size(self) -> int:
        """Samples of a global batch on one rank, at most."""
        return -(-self.global_batch_size // self.team.size)

    def _start_adam(self) -> None:
        """Adam's state as PyTorch makes it at the first step, so that it can be compiled with and loaded into."""
        zeros = {index: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight),
                         "exp_avg_sq": torch.zeros_like(weight)}
                 for index, weight in enumerate(self.module.parameters())}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": zeros})

    def make_step(self, warn: Callable[[str], None] = lambda message: None, *, was_compiled: bool = False) -> None:
        """Make this run's kind of step; compiling it may take many seconds. Collective."""
        if self.kind_before == "fused" != self.kind:
            reason = why_not(self.parts)
            warn(f"the run had the fused step{f', which {reason}' if reason else ''}: it goes on with the {self.kind} "
                 "step, and the bits differ from here on")
        self.step = make_step(self.config, self.parts, warn, kind=self.kind, was_compiled=was_compiled)

    def begin(self, epoch: int, steps: range, watch: Stopwatch) -> None:
        """Go to these steps of the epoch, on the clock of `watch`. Collective."""
        self.epoch, self.left, self.watch = epoch, steps, watch
        if steps:
            self._open_window()
            self.step.begin(epoch, steps)

    def advance(self, schedule: PauseSchedule) -> bool:
        """Take steps up to the next stop: of the schedule, of the warm-up, or of all steps. The ranks then agree
        whether to pause; returns whether they do. `left` are the steps that are left. Collective.

        In a pause and at the end the clock stands still, and the weights may be read.
        """
        start = self.left.start
        stop = min(self.left.stop, schedule.next_stop(self.epoch, start))
        if was_warming := self._warm_left > 0:
            stop = min(stop, start + self._warm_left)
        window = self._window or self._open_window()
        self._is_taking = True
        self.step.take(range(start, stop), window.lap)
        self.step.flush(stop)
        self._is_taking = False  # what follows waits for other ranks over gloo, which has a time limit
        schedule.poll(stop - start)
        self.left, self._warm_left = range(stop, self.left.stop), max(0, self._warm_left - (stop - start))
        pauses = schedule.is_pause_due(self.epoch, stop)
        if pauses or not self.left or was_warming != (self._warm_left > 0):
            self.step.pause()
            self._clock.close()
            self._window = None
        return pauses

    def _open_window(self) -> Window:
        self.module.train()
        self._window = self._clock.enter_context(self.watch.window(warmup=self._warm_left > 0))
        return self._window

    def train_loss(self, epoch: int, num_steps: int) -> float:
        """Mean loss per sample of the epoch's steps so far. Raises `Diverged` with the first step whose loss is not
        finite. The sums are then whole on the main rank and zero elsewhere, and `noise` is what they say. Collective.
        """
        total = self.team.sum(self.sums.clone())
        self.team.wait_for_device()  # with a time limit; reading the sums has none
        losses, samples, batches = total[:, :num_steps].tolist()
        self.losses = losses
        for step, loss in enumerate(losses):
            if not math.isfinite(loss):
                self.losses = losses[:step]
                at = epoch * self.batches.num_batches + step + 1
                raise Diverged(f"training diverged: the loss is {loss} at step {at} (epoch {epoch}); try a smaller "
                               f"--lr than {self.learning_rate:g}")
        self.sums.copy_(total) if self.team.is_main else self.sums.zero_()
        counts = [self.batches.count(step) for step in range(num_steps)]
        self.noise = noise_scale(samples, batches, counts) if self.parts.measures_noise else NOT_KNOWN
        return sum(losses) / sum(counts)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """The metrics of the test: float64 sums over every test image once, gathered, added in order, then divided.

        Collective.
        """
        self.module.eval()
        sums_3 = torch.zeros(3, dtype=torch.float64, device=self.team.device)
        for images, labels in self.test_loader:
            if self.config.reproducible:
                sums_3 += reproducible.batch_sums(self.module, images, labels)
            else:
                sums_3 += batch_sums(self.module(scale(images, self.dtype)), labels)
        total_3 = add_in_order(self.team.gather(sums_3))
        self.team.wait_for_device()
        metrics = metrics_of_test(total_3.tolist())
        if metrics["test_count"] != len(self.sets.test):
            raise AssertionError(f"evaluated {metrics['test_count']} of {len(self.sets.test)} test images")
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the training: weights, Adam's moments and step counts, sums of the epoch."""
        kept = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            kept |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        return kept | {"sums": self.sums}

    def load_tensors(self, kept: dict[str, Tensor]) -> None:
        """Continue from what `tensors` gave, on this or another number of ranks. Tensors stay in their memory."""
        for name, tensor in self.tensors().items():
            tensor.copy_(kept[name])
        if not self.team.is_main:
            self.sums.zero_()
