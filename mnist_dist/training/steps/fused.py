"""Many optimizer steps with one launch: the step of fused_kernels.py, for one process on one GPU."""

from __future__ import annotations

import importlib.util
import math
import time
from typing import Any

import numpy as np
import torch

from mnist_dist.errors import UserError
from mnist_dist.text import first_line
from mnist_dist.training.steps.ahead import Ahead
from mnist_dist.training.steps.step import Lap, StepParts, no_lap

LAUNCH_SECONDS = 0.1  # of a launch at most: signals and checkpoints wait for its end
FIRST_LAUNCH = 16  # steps; a launch then has at most twice the steps of the launch before
MOST_UNITS, UNITS = 512, 16  # of the hidden layer: at most, and a multiple of
MOST_SAMPLES, MOST_IMAGES = 16_384, 2_000_000  # of a batch; of an epoch, whose places are 32-bit numbers
MOST_ROWS = 128  # of a block: with more, registers do not hold it
LEAST_CAPABILITY = (8, 0)  # of a GPU: bfloat16 on tensor cores


def why_not(parts: StepParts) -> str | None:
    """Why the fused step cannot take this run, as the end of a sentence; None if it can."""
    return excluded_by(parts) or _why_no_triton()


def excluded_by(parts: StepParts) -> str | None:
    """The same, as far as the run and its GPU decide; without importing Triton."""
    team, sizes, batch = parts.team, parts.module.sizes, parts.batches.count(0)
    units = sizes[1] if len(sizes) == 3 else 0
    reasons = {
        f"needs one process, and there are {team.size}": team.size > 1,
        "needs a GPU, and this run is on the CPU": team.device.type != "cuda",
        f"needs float32, got {str(parts.dtype).removeprefix('torch.')}": parts.dtype != torch.float32,
        f"needs no mixed precision, got {team.accelerator.mixed_precision}": team.accelerator.mixed_precision != "no",
        "has no --noise-scale": parts.measures_noise,
        f"needs one hidden layer of at most {MOST_UNITS} units, a multiple of {UNITS}":
            not 0 < units <= MOST_UNITS or units % UNITS > 0,
        f"needs a batch of at most {MOST_SAMPLES:,}, got {batch:,}": batch > MOST_SAMPLES,
        f"needs at most {MOST_IMAGES:,} images": parts.batches.num_samples > MOST_IMAGES,
    }
    if reason := next((reason for reason, is_so in reasons.items() if is_so), None):
        return reason
    if torch.version.hip is not None or torch.cuda.get_device_capability(team.device) < LEAST_CAPABILITY:
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install triton"
    from triton.backends.nvidia.compiler import CUDAOptions

    return None if hasattr(CUDAOptions, "launch_cooperative_grid") else "needs a newer Triton: pip install -U triton"


class FusedStep:
    """The interface of `Step`. Raises `UserError` if the kernel cannot be compiled."""

    kind = "fused"

    def __init__(self, parts: StepParts) -> None:
        from mnist_dist.training.steps import fused_kernels

        self.kernels, self.batches, self.images = fused_kernels, parts.batches, parts.images
        self.device, self.sums = parts.team.device, parts.sums
        (self.options,) = parts.optimizer.optimizer.param_groups
        state = parts.optimizer.optimizer.state
        self.tensors: list[torch.Tensor] = []  # of each parameter: itself, Adam's mean, Adam's mean square
        for parameter in parts.module.parameters():
            self.tensors += [parameter.detach(), state[parameter]["exp_avg"], state[parameter]["exp_avg_sq"]]
        self.counts = [state[parameter]["step"] for parameter in parts.module.parameters()]
        self._allocate(parts.module.sizes[1])
        self.ahead = Ahead(self._prepared)
        self.length = FIRST_LAUNCH  # steps of a launch
        self._timed: tuple[Any, Any, int] | None = None  # a launch: the events around it, and its steps
        begin = time.perf_counter()
        try:
            self._launch(0, 0)
        except Exception as error:  # Triton has many kinds
            raise UserError(f"the fused step could not be compiled ({first_line(error)}): give --compile on or off"
                            ) from error
        self.compile_seconds = time.perf_counter() - begin

    def _allocate(self, units: int) -> None:
        """The memory of the kernel, and how its work is cut."""
        rows, images, slices = self.batches.count(0), self.batches.num_samples, self.kernels.SLICES
        self.rows = rows  # of a batch

        def memory(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.sorted = memory(slices, images, self.kernels.PADDED_SLICE, dtype=torch.uint8)
        self.labels = memory(images, dtype=torch.int32)
        self.corrections = memory(self.batches.num_batches, 2)
        self.counter = memory(1, dtype=torch.int32)
        self.work = [memory(slices, rows, units), memory(rows, units), memory(rows, units),
                     memory(rows, self.kernels.PADDED_CLASSES), memory(rows)]
        tiles = slices * (units // self.kernels.UNITS)
        self.programs = min(tiles, self._multiprocessors())
        block = min(MOST_ROWS, max(16, 1 << (rows - 1).bit_length()))
        is_resident, (beta1, beta2) = self.programs == tiles, self.options["betas"]
        self.constants = {
            "H": units, "H_PADDED": 1 << (units - 1).bit_length(), "R": block,
            "LOSS_ROWS": 2 if rows > self.programs else 1, "TILES": tiles, "IS_RESIDENT": is_resident,
            "KEEPS_PIXELS": is_resident and rows <= block, "BETA1": beta1, "BETA2": beta2,
            "EPSILON": self.options["eps"],
        }
        self.warps = 4 if block <= 32 else 8

    def _multiprocessors(self) -> int:
        """Programs that run at the same time, for certain."""
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def begin(self, epoch: int, steps: range) -> None:
        """Go to these steps of the epoch: its images are put in their order on the device."""
        begin = time.perf_counter()
        order, corrections = (torch.from_numpy(made).to(self.device, non_blocking=True)
                              for made in self.ahead.of(epoch))
        slices, used = self.kernels.SLICES, self.kernels.SLICE
        images = self.images.images.flatten(1).index_select(0, order)
        self.sorted[:, :, :used] = images.view(len(images), slices, used).transpose(0, 1)
        self.labels.copy_(self.images.labels.index_select(0, order))
        self.corrections.copy_(corrections)
        self.waited = time.perf_counter() - begin

    def _prepared(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the epoch; and float32 [steps of the epoch, 2], the rate and the root of Adam's bias
        corrections, computed in float64.
        """
        taken = epoch * self.batches.num_batches + np.arange(1.0, self.batches.num_batches + 1)
        beta1, beta2 = self.options["betas"]
        corrections = np.stack([self.options["lr"] / (1 - beta1**taken), np.sqrt(1 - beta2**taken)], 1)
        return self.batches.order(epoch), corrections.astype(np.float32)

    @torch.no_grad()
    def take(self, steps: range, lap: Lap = no_lap) -> None:
        """Optimizer steps, some thousand in a launch. The first launch of an epoch has waited for the order."""
        start = steps.start
        while start < steps.stop:
            end = min(steps.stop, start + self._next_length())
            self._launch(start, end - start)
            torch._foreach_add_(self.counts, end - start)
            lap([self.batches.count(step) for step in range(start, end)], self.waited)
            start, self.waited = end, 0.0

    def _next_length(self) -> int:
        """Steps of the next launch, as long as LAUNCH_SECONDS. If the last launch is not over, as many as it had."""
        if self._timed is not None and self._timed[1].query():
            begin, end, steps = self._timed
            seconds = begin.elapsed_time(end) / 1000 / steps
            self.length = max(1, min(2 * self.length, math.floor(LAUNCH_SECONDS / seconds)))
            self._timed = None
        return self.length

    def _launch(self, first: int, steps: int) -> None:
        """Queue these steps."""
        self.counter.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        self._run(first, steps, STAGE=0, num_warps=self.warps, launch_cooperative_grid=True)
        events[1].record()
        if steps and self._timed is None:
            self._timed = events[0], events[1], steps

    def _run(self, first: int, steps: int, **options: Any) -> None:
        """Start the kernel."""
        self.kernels.take_steps[(self.programs,)](
            self.sorted, self.labels, self.batches.num_samples, self.rows, first, steps,
            self.corrections, self.sums, self.counter, *self.tensors, *self.work, **self.constants, **options)

    def flush(self, step: int) -> None:
        """Nothing to do: the kernel writes to `sums`."""

    def pause(self) -> None:
        """Nothing to do: the weights are up to date."""
