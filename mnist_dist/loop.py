"""Train and evaluate: the step loop, and the places where the processes of a run meet in it.

The k-th step averages the gradient over the k-th global batch, whatever the number of processes and passes. Nothing in
the loop waits for the device: losses stay there until an epoch ends or a checkpoint is due. Every half second or so the
processes agree, on the host, whether a signal or the clock wants them to pause. It knows nothing of files or trackers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from mnist_dist.config import TrainConfig
from mnist_dist.data import ImageSets, scale
from mnist_dist.errors import Diverged
from mnist_dist.metrics import Stopwatch, Window, batch_sums, test_figures
from mnist_dist.model import MLP
from mnist_dist.processes import StopSignals, Team
from mnist_dist.sampling import make_loader
from mnist_dist.shards import ShardedGradient, add_in_order, gather_in_order, own_shards

WARMUP_STEPS = 5  # the first steps of a process allocate, tune and compile: timed apart
EVALUATION_BATCH = 1000  # images per process, or per logical shard: bounds memory, changes no result
POLL_SECONDS = 0.5  # between two meetings of the processes on the host


class Trainer:
    """The model, its optimizer and loaders on this process, and the steps through them."""

    def __init__(self, config: TrainConfig, team: Team, sets: ImageSets) -> None:
        accelerator = team.accelerator
        self.team, self.accelerator, self.sets = team, accelerator, sets
        self.passes = accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
        self.batch_size = config.global_batch_size(team.size)
        self.learning_rate = config.learning_rate(self.batch_size)
        self.dtype = getattr(torch, config.dtype)
        self.num_shards = config.logical_shards if config.reproducible else team.size
        share = {"rank": team.rank, "size": team.size}
        self.train_loader = make_loader(sets.train.to(accelerator.device), self.batch_size, shuffle=config.shuffle,
                                        seed=config.seed, passes=self.passes, **share)
        self.test_loader = make_loader(sets.test.to(accelerator.device), EVALUATION_BATCH * self.num_shards, **share)
        self.batches = self.train_loader.batch_sampler
        torch.manual_seed(config.seed)
        # drawn in float32 and then widened: float32 and float64 runs start from the same weights
        self.module = MLP().to(accelerator.device, self.dtype)
        self.model = accelerator.prepare_model(self.module, evaluation_mode=config.reproducible)
        self.optimizer = accelerator.prepare_optimizer(
            torch.optim.Adam(self.module.parameters(), lr=self.learning_rate, fused=True)
        )
        self.losses = torch.zeros(self.batches.num_batches, dtype=torch.float64, device=accelerator.device)
        self.sharded = None
        if config.reproducible:
            self.sharded = ShardedGradient(self.module, self.num_shards, team.size, accelerator.gather)
        self.signals = StopSignals()
        self.progress: Callable[[int], None] = lambda step: None  # told of steps done, at every poll
        self.stop_signal = 0  # as agreed by all processes
        self.checkpoint_due = False
        self.last_checkpoint = time.monotonic()
        self.checkpoint_seconds = math.inf
        self._poll_steps, self._polled_at = 1, time.monotonic()
        self._warm = 0

    def train_epoch(self, epoch: int, steps: range, watch: Stopwatch, between: Callable[[int], None],
                    pause_every: int | None = None) -> None:
        """Run these steps of the epoch. `between(step)` is called in pauses, off the clock, `step` steps being done:
        after every `pause_every`-th step of the run, when the clock or a signal asks, and before the epoch's last.
        """
        self.batches.first_step, self.batches.end_step = steps.start, steps.stop
        self.train_loader.set_epoch(epoch)
        self.model.train()
        batches, step = iter(self.train_loader), steps.start
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
                reached = self._run(batches, step, end, window)
            self._warm, step = self._warm + reached - step, reached
            if step < steps.stop:
                between(step)

    def _run(self, batches: Iterator, step: int, end: int, window: Window) -> int:
        """Take steps up to `end`, or to where the processes agree to pause; returns the step reached."""
        take_step = self._sharded_step if self.sharded else self._step
        while step < end:
            stretch = min(end, step + self._poll_steps)
            for index in range(step, stretch):
                waited = take_step(batches, index)
                window.lap(self.batches.count(index), waited)
            pause = self.poll(stretch - step)
            step = stretch
            self.progress(step)
            if pause:
                break
        return step

    def _step(self, batches: Iterator, step: int) -> float:
        """One optimizer step; returns the seconds waited for data.

        DistributedDataParallel averages over P ranks and Accelerate over the passes; the ranks' shares of the batch
        differ, so the sum of the local losses is scaled to make both a mean over the batch's samples.
        """
        accelerator, waited = self.accelerator, 0.0
        factor = self.team.size * self.passes / self.batches.count(step)
        for _ in range(self.passes):
            asked = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - asked
            with accelerator.accumulate(self.model):
                loss_sum = nll_loss(self.model(scale(images, self.dtype)), labels, reduction="sum")
                accelerator.backward(loss_sum * factor)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.losses[step] += loss_sum.detach()
        return waited

    def _sharded_step(self, batches: Iterator, step: int) -> float:
        """As `_step`, with the same bits on any number of processes."""
        asked = time.perf_counter()
        images, labels = next(batches)
        waited = time.perf_counter() - asked
        shards = own_shards(self.batches, step, self.num_shards)
        loss_sum = self.sharded.set(
            (nll_loss(self.model(scale(images[own], self.dtype)), labels[own], reduction="sum") for own in shards),
            self.batches.count(step),
        )
        self.optimizer.step()
        if self.team.is_main:  # the same sum is on every rank
            self.losses[step] += loss_sum
        return waited

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
        """Continue from what `tensors` gave, on this or another number of processes."""
        self.module.load_state_dict(
            {name.removeprefix("model."): tensor for name, tensor in kept.items() if name.startswith("model.")}
        )
        moments: dict[int, dict[str, Any]] = {}
        for name, tensor in kept.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.losses.copy_(kept["losses"]) if self.team.is_main else self.losses.zero_()
