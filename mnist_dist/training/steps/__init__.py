"""The kinds of optimizer step, and the choice between them. Each kind must agree with `plain`, the reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from mnist_dist.config import TrainConfig
from mnist_dist.errors import UserError
from mnist_dist.record.gains import read_gain
from mnist_dist.training.steps.step import Step, StepParts

# On the CPU: on two cores a step saves some 0.5 ms, and compiling costs 3 s if the code is in the user's cache, and 8 s
# the first time: 6,000 to 16,000 steps pay for it (docs/performance.md).
WORTH_COMPILING_STEPS = 12_000


def wants_compiling(config: TrainConfig, parts: StepParts, before: str | None = None) -> bool:
    """Whether this run's step is to be compiled: as asked, and with `auto` if that pays within the run.

    A run that is continued keeps the kind of step that it had `before`, because its bits depend on it. On a GPU the
    saving must have been measured on the same kind of GPU (record/gains.py); else the step is the plain one. Raises
    `UserError`. Collective.
    """
    precision = parts.team.accelerator.mixed_precision
    if precision == "fp16" and config.compile == "on":  # the launcher may have set it
        raise UserError("--compile on and mixed precision fp16 exclude each other: drop one")
    if config.compile != "auto":
        return config.compile == "on"
    if precision == "fp16" or config.clashes_with_compile:
        return False
    if before is not None:
        return before == "compiled"
    steps = min(config.epochs * parts.batches.num_batches, config.max_steps or math.inf)
    if parts.team.device.type == "cpu":
        return steps >= WORTH_COMPILING_STEPS
    name = torch.cuda.get_device_name(parts.team.device)
    gain = parts.team.run_on("main", lambda: read_gain(name))  # the other machines may have no such file
    return gain is not None and gain.pays(steps)


def make_step(config: TrainConfig, parts: StepParts, warn: Callable[[str], None], *, compiles: bool,
              was_compiled: bool = False) -> Step:
    """The step of this run. If compiling fails and was not asked for, that is a warning. Collective.

    With `was_compiled` an earlier start of this launch has filled the compiler's cache: then no rank goes first.
    """
    from mnist_dist.training.steps.compiled import CompiledStep
    from mnist_dist.training.steps.cuda_graph import GraphStep
    from mnist_dist.training.steps.plain import PlainStep
    from mnist_dist.training.steps.reproducible import ReproducibleStep

    if compiles:
        build = functools.cache(lambda: (GraphStep if parts.team.is_cuda else CompiledStep)(parts))
        try:
            if not parts.team.is_cuda and not was_compiled:
                # once per machine first: the other ranks find its code in the compiler's cache. Code for a GPU they
                # would not find, because the key holds the GPU's number
                parts.team.run_on("machine", lambda: build() and None, patient=True)
            step = parts.team.run_on("every", build, patient=True)
        except UserError as error:
            if config.compile == "on":
                raise
            warn(f"{error}; continuing with the plain step")
        else:
            if isinstance(step, GraphStep):
                step.record()
            return step
    if config.reproducible:
        return ReproducibleStep(parts)
    return PlainStep(parts, config.local_sgd_steps)
