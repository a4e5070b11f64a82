"""Train and evaluate: the step loop, and the places where the processes of a run meet in it.

The k-th step averages the gradient over the k-th global batch, whatever the number of processes and passes. Nothing in
the loop waits for the device: losses stay there until an epoch ends or a checkpoint is due. Every half second or so the
processes agree, on the host, whether a signal or the clock wants them to pause. It knows nothing of files or trackers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mnist_dist import compiled
from mnist_dist.config import TrainConfig
from mnist_dist.data import ImageSets, scale
from mnist_dist.errors import Diverged, UserError
from mnist_dist.metrics import Stopwatch, Window, batch_sums, test_figures
from mnist_dist.model import MLP
from mnist_dist.processes import StopSignals, Team
from mnist_dist.sampling import make_loader, share_out
from mnist_dist.shards import ShardedStep, add_in_order, gather_in_order, own_shards
from mnist_dist.steps import PlainStep

WARMUP_STEPS = 5  # the first steps of a process allocate, tune and compile: timed apart
EVALUATION_BATCH = 1000  # images per process, or per logical shard: bounds memory, changes no result
POLL_SECONDS = 0.5  # between two meetings of the processes on the host


class Trainer:
    """The model, its optimizer and loaders on this process, and the steps through them."""

    def __init__(self, config: TrainConfig, team: Team, sets: ImageSets, kind_before: str | None = None) -> None:
        accelerator = team.accelerator
        self.config, self.team, self.accelerator, self.sets = config, team, accelerator, sets
        accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
        self.batch_size = config.global_batch_size(team.size)
        self.largest_share = -(-self.batch_size // team.size)  # of a batch, on one process
        self.learning_rate = config.learning_rate(self.batch_size)
        self.dtype = getattr(torch, config.dtype)
        self.num_shards = config.logical_shards if config.reproducible else team.size
        share = {"rank": team.rank, "size": team.size}
        self.images = sets.train.to(accelerator.device)
        self.batches = share_out(self.images, self.batch_size, shuffle=config.shuffle, seed=config.seed,
                                 passes=config.gradient_accumulation_steps, **share)
        test = sets.test.to(accelerator.device)
        self.test_loader = make_loader(test, share_out(test, EVALUATION_BATCH * self.num_shards, **share))
        torch.manual_seed(config.seed)
        # drawn in float32 and then widened: float32 and float64 runs start from the same weights
        self.module = MLP().to(accelerator.device, self.dtype)
        self.losses = torch.zeros(self.batches.num_batches, dtype=torch.float64, device=accelerator.device)
        # fused also where the step is compiled: it decides where Adam's step counts are, and compiled code may not care
        self.optimizer = accelerator.prepare_optimizer(
            torch.optim.Adam(self.module.parameters(), lr=self.learning_rate, fused=True)
        )
        self._start_adam()
        self.compiles = compiled.is_wanted(config, self.images, self.batches, accelerator, kind_before)
        self.signals = StopSignals()
        self.progress: Callable[[int], None] = lambda step: None  # told of steps done, at every poll
        self.stop_signal = 0  # as agreed by all processes
        self.checkpoint_due = False
        self.last_checkpoint = time.monotonic()
        self.checkpoint_seconds = math.inf
        self._poll_steps, self._polled_at = 1, time.monotonic()
        self._warm = 0

    def make_step(self, warn: Callable[[str], None] = lambda message: None) -> None:
        """Make the kind of step that this run takes; compiling it may take many seconds. Collective."""
        self.step = (self._compiled_step(warn) if self.compiles else None) or self._plain_step()

    def _start_adam(self) -> None:
        """Adam's state as PyTorch would make it at the first step, so that it is there to compile with and to load."""
        zeros = {index: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight),
                         "exp_avg_sq": torch.zeros_like(weight)}
                 for index, weight in enumerate(self.module.parameters())}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": zeros})

    def _compiled_step(self, warn: Callable[[str], None]) -> compiled.CompiledStep | None:
        """The step, compiled; None, with a warning, where that fails and was not asked for. Collective."""
        accelerator = self.accelerator
        # DistributedDataParallel is left out: its hooks need a backward pass that autograd runs
        self.model = accelerator.prepare_model(self.module, evaluation_mode=True)
        steps: list[compiled.CompiledStep] = []

        def build() -> None:
            if not steps:
                steps.append(compiled.CompiledStep(accelerator, self.module, self.optimizer, self.images, self.batches,
                                                   self.losses, self.dtype))

        try:
            for where in ("machine", "everywhere"):  # the others find the first one's code in the cache
                self.team.agree(build, where=where, patient=True)
        except UserError as error:
            if self.config.compile == "on":
                raise
            warn(f"{error}; going on with the plain step")
            return None
        return steps[0]

    def _plain_step(self) -> PlainStep:
        self.model = self.accelerator.prepare_model(self.module, evaluation_mode=self.config.reproducible)
        parts = (self.accelerator, self.model, self.optimizer, self.images, self.batches, self.losses, self.dtype)
        if self.config.reproducible:
            return ShardedStep(*parts, num_shards=self.num_shards, is_main=self.team.is_main)
        return PlainStep(*parts, local_steps=self.config.local_sgd_steps)

    def train_epoch(self, epoch: int, steps: range, watch: Stopwatch, between: Callable[[int], None],
                    pause_every: int | None = None) -> None:
        """Run these steps of the epoch. `between(step)` is called in pauses, off the clock, `step` steps being done:
        after every `pause_every`-th step of the run, when the clock or a signal asks, and before the epoch's last.
        """
        self.model.train()
        step, begun = steps.start, False
        before = epoch * self.batches.num_batches
        while step < steps.stop:
            end = steps.stop
            if pause_every:
                end = min(end, step + pause_every - (before + step) % pause_every)
            # of an epoch with few steps, at most a quarter is warm-up, so that something is left to measure
            warmup = min(WARMUP_STEPS, self.batches.num_batches // 4) - self._warm
            if warmup > 0:
                end = min(end, step + warmup)
            with watch.window(warmup=warmup > 0) as window:
                if not begun:
                    self.step.begin(epoch, steps)
                    begun = True
                reached = self._run(step, end, window)
            self._warm, step = self._warm + reached - step, reached
            if step < steps.stop:
                between(step)

    def _run(self, step: int, end: int, window: Window) -> int:
        """Take steps up to `end`, or to where the processes agree to pause; returns the step reached."""
        while step < end:
            stretch = min(end, step + self._poll_steps)
            for index in range(step, stretch):
                waited = self.step.take(index)
                window.lap(self.batches.count(index), waited)
            self.step.finish(stretch)
            pause = self.poll(stretch - step)
            step = stretch
            self.progress(step)
            if pause:
                break
        self.step.pause()
        return step

    def poll(self, steps_done: int = 0) -> bool:
        """Agree on signals and due checkpoints; whether there is reason to pause. Collective."""
        now = time.monotonic()
        per_step = (now - self._polled_at) / steps_done if steps_done else 0.0
        self._polled_at = now
        due = now - self.last_checkpoint >= self.checkpoint_seconds
        number, due, per_step = self.team.highest(self.signals.number, due, per_step)
        self.stop_signal, self.checkpoint_due = int(number), bool(due)
        if per_step:
            self._poll_steps = max(1, int(POLL_SECONDS / per_step))
        return bool(self.stop_signal or self.checkpoint_due)

    def train_loss(self, epoch: int, num_steps: int) -> float:
        """Mean loss per sample of the epoch's steps so far. Raises `Diverged` with the first step whose loss is not
        finite. The losses are then whole on the main process and zero elsewhere. Collective.
        """
        total = self.accelerator.reduce(self.losses, reduction="sum")
        losses = total[:num_steps].tolist()
        for step, loss in enumerate(losses):
            if not math.isfinite(loss):
                at = epoch * self.batches.num_batches + step + 1
                raise Diverged(f"training diverged: the loss is {loss} at step {at} (epoch {epoch}); try a smaller "
                               f"--lr than {self.learning_rate:g}")
        self.losses.copy_(total) if self.team.is_main else self.losses.zero_()
        return sum(losses) / sum(self.batches.count(step) for step in range(num_steps))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float | int]:
        """The test figures: float64 sums over every test image once, gathered, added in order, then divided."""
        self.model.eval()
        batches = self.test_loader.batch_sampler
        own = self.num_shards // self.team.size
        sums_K3 = torch.zeros(own, 3, dtype=torch.float64, device=self.accelerator.device)
        for step, (images, labels) in enumerate(self.test_loader):
            for k, shard in enumerate(own_shards(batches, step, self.num_shards)):
                sums_K3[k] += batch_sums(self.model(scale(images[shard], self.dtype)), labels[shard])
        figures = test_figures(
            add_in_order(gather_in_order(sums_K3, self.accelerator.gather, self.team.size)).tolist()
        )
        if figures["test_count"] != len(self.sets.test):
            raise AssertionError(f"evaluated {figures['test_count']} of {len(self.sets.test)} test images")
        return figures

    def synchronize(self) -> None:
        """Wait until the device has done its queue and every process is here."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.accelerator.wait_for_everyone()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the training: weights, Adam's moments and step counts, losses of the epoch."""
        kept = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            kept |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        return kept | {"losses": self.losses}

    def load_tensors(self, kept: dict[str, Tensor]) -> None:
        """Continue from what `tensors` gave, on this or another number of processes. Tensors stay where they are."""
        for name, tensor in self.tensors().items():
            tensor.copy_(kept[name])
        if not self.team.is_main:
            self.losses.zero_()
