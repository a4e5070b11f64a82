"""The kinds of optimizer step, and the choice between them. Each kind must agree with `plain`, the reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from mnist_dist.config import TrainConfig
from mnist_dist.errors import UserError
from mnist_dist.record.gains import read_gain
from mnist_dist.training.steps import fused
from mnist_dist.training.steps.step import Step, StepParts

# On the CPU: on two cores a step saves some 0.5 ms, and compiling costs 3 s if the code is in the user's cache, and 8 s
# the first time: 6,000 to 16,000 steps pay for it (docs/performance.md).
WORTH_COMPILING_STEPS = 12_000


def kind_of_step(config: TrainConfig, parts: StepParts, before: str | None = None) -> str:
    """The kind of this run's step: "exact", "plain", "compiled" or "fused". With `--compile auto` it is compiled if
    that pays within the run.

    A run that is continued keeps the kind that it had `before`, if that is possible here, because its bits depend on
    it. On a GPU the saving must have been measured on the same kind of GPU (record/gains.py); else the step is plain.
    Raises `UserError`. Collective.
    """
    if config.reproducible:
        return "exact"
    if config.compile == "fused":
        if (reason := fused.why_not(parts)) and before != "fused":
            raise UserError(f"--compile fused {reason}: give --compile on, off or auto")
        return "plain" if reason else "fused"
    precision = parts.team.accelerator.mixed_precision
    if precision == "fp16" and config.compile == "on":  # the launcher may have set it
        raise UserError("--compile on and mixed precision fp16 exclude each other: drop one")
    if config.compile != "auto":
        return "compiled" if config.compile == "on" else "plain"
    if precision == "fp16" or config.clashes_with_compile:
        return "plain"
    if before is not None:
        return before if before != "fused" or fused.why_not(parts) is None else "plain"
    return "compiled" if _compiling_pays(config, parts) else "plain"


def _compiling_pays(config: TrainConfig, parts: StepParts) -> bool:
    """Whether the run has enough steps. Collective."""
    steps = min(config.epochs * parts.batches.num_batches, config.max_steps or math.inf)
    if parts.team.device.type == "cpu":
        return steps >= WORTH_COMPILING_STEPS
    name = torch.cuda.get_device_name(parts.team.device)
    gain = parts.team.run_on("main", lambda: read_gain(name))  # the other machines may have no such file
    return gain is not None and gain.pays(steps)


def make_step(config: TrainConfig, parts: StepParts, warn: Callable[[str], None], *, kind: str,
              was_compiled: bool = False) -> Step:
    """The step of this kind. If compiling fails and was not asked for, that is a warning. Collective.

    With `was_compiled` an earlier start of this launch has filled the compiler's cache: then no rank goes first.
    """
    from mnist_dist.training.steps.compiled import CompiledStep
    from mnist_dist.training.steps.cuda_graph import GraphStep
    from mnist_dist.training.steps.plain import PlainStep
    from mnist_dist.training.steps.reproducible import ReproducibleStep

    if kind in ("compiled", "fused"):
        kinds: dict[str, Any] = {"compiled": GraphStep if parts.team.is_cuda else CompiledStep,
                                 "fused": fused.FusedStep}
        build = functools.cache(lambda: kinds[kind](parts))
        try:
            if not parts.team.is_cuda and not was_compiled:
                # once per machine first: the other ranks find its code in the compiler's cache. Code for a GPU they
                # would not find, because the key holds the GPU's number
                parts.team.run_on("machine", lambda: build() and None, patient=True)
            step = parts.team.run_on("every", build, patient=True)
        except UserError as error:
            if config.compile != "auto":
                raise
            warn(f"{error}; continuing with the plain step")
        else:
            if isinstance(step, GraphStep):
                step.record()
            return step
    if kind == "exact":
        return ReproducibleStep(parts)
    return PlainStep(parts, config.local_sgd_steps)
