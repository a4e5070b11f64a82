"""The whole optimizer step as one compiled function: gather, scaling, forward, loss, backward and Adam.

It runs on the weights and Adam's moments that Accelerate wraps. It uses the model's forward, `loss_sum` and PyTorch's
Adam, so that the mathematics is written once. With several ranks or passes it is two functions, with one flat gradient
between them. docs/performance.md has the measurements.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.optim.adam import adam

from mnist_dist.errors import UserError
from mnist_dist.processes.core_contention import one_thread
from mnist_dist.text import first_line
from mnist_dist.training.noise_scale import squared_norms
from mnist_dist.training.sampling import NO_INDEX
from mnist_dist.training.steps.inductor import compile_once, compiler_failure, keep_compiled_code
from mnist_dist.training.steps.plain import NO_SAMPLE, loss_sum
from mnist_dist.training.steps.step import Lap, StepParts, no_lap

# Samples. On the CPU a larger batch is taken in parts of about this size, so that the last batch of an epoch is padded
# by at most a part.
PART = 1024


class CompiledStep:
    """The interface of `Step`. The host starts each step.

    Raises `UserError` if there is no compiler, or it fails.
    """

    kind = "compiled"

    def __init__(self, parts: StepParts) -> None:
        self.team, self.images, self.batches = parts.team, parts.images, parts.batches
        self.sums, self.dtype, self.device = parts.sums, parts.dtype, parts.team.device
        self.contention, self.onednn_from = parts.contention, parts.onednn_from
        # without DistributedDataParallel: its hooks need a backward pass that autograd runs
        self.module = parts.team.accelerator.prepare_model(parts.module, evaluation_mode=True)
        # the same memory, without autograd
        self.weights = {name: weight.detach() for name, weight in parts.module.named_parameters()}
        adam_of = parts.optimizer.optimizer
        self.options = adam_of.param_groups[0]
        state = [adam_of.state[weight] for weight in parts.module.parameters()]
        self.state = {name: [kept[name] for kept in state] for name in ("step", "exp_avg", "exp_avg_sq")}
        self.recorded: list[Tensor] = []  # the sums of steps taken since `flush`
        # of the linear layers, if the noise scale is measured
        self.outputs = [layer.out_features for layer in parts.module.modules()
                        if isinstance(layer, torch.nn.Linear) and parts.measures_noise]
        numbers = (self.batches.count(0), self.batches.count(self.batches.num_batches - 1))  # of a global batch
        self.full, self.last = (torch.tensor(float(n), dtype=self.dtype, device=self.device) for n in numbers)
        longest = -(-self.batches.count(0) // (self.team.size * self.batches.passes))  # samples of a pass, on a rank
        self.in_pass = max(1, longest // PART) if self.device.type == "cpu" else 1  # parts
        self.parts = self.batches.passes * self.in_pass  # of a rank's share of a batch
        self.flat: Any = None  # the gradient, a tensor, if several ranks or parts make it
        if self.team.size > 1 or self.parts > 1:
            self.flat = torch.zeros(sum(weight.numel() for weight in self.weights.values()), dtype=self.dtype,
                                    device=self.device)
        # None: not tried yet. With more than two threads, one thread would leave more than one core idle
        self.same_bits_with_one_thread = None if torch.get_num_threads() == 2 else False
        begin = time.perf_counter()
        keep_compiled_code()
        try:
            self._compile()
        except Exception as error:
            remedy = compiler_failure(error)
            if remedy is None:
                raise
            raise UserError(f"the step could not be compiled ({first_line(error)}): {remedy}") from error
        self.compile_seconds = time.perf_counter() - begin

    def _compile(self) -> None:
        rows, least = self.batches.rows(self.in_pass)[0].to(self.device), self.onednn_from
        if self.flat is None:
            self._whole = compile_once(self._whole_step, rows, self.full, onednn_from=least)
        else:
            self._accumulate = compile_once(self._accumulate_gradient, rows, self.full, onednn_from=least)
            self._apply = compile_once(self._apply_gradient)

    def _gradients(self, weights: dict[str, Tensor], rows_B: Tensor, count: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gradients of sum(loss of these samples) / `count`; and the sum of losses [1], or with the noise scale also
        that of the samples' squared gradient norms, and 0 [3].
        """
        labels_B = self.images.labels[rows_B].masked_fill(rows_B == NO_INDEX, NO_SAMPLE)
        images_B1HW = self.images.images[rows_B]

        # zeros are added to each output: their gradient is the gradient of the output, and they cost nothing
        zeros = [images_B1HW.new_zeros(len(rows_B), size, dtype=self.dtype) for size in self.outputs]

        def mean_loss(both: tuple[dict[str, Tensor], list[Tensor]]) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
            """The mean over the batch; and the sum and the layers' inputs, which are computed on the way."""
            weights, zeros = both
            inputs: list[Tensor] = []

            def linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
                y = layer(x)
                if zeros:
                    y = y + zeros[len(inputs)].to(y.dtype)
                    inputs.append(x)
                return y

            total = loss_sum(lambda x: functional_call(self.module, weights, (x, linear)), images_B1HW, labels_B,
                             self.dtype)
            return total / count, (total, inputs)

        (gradients, of_outputs), (_, (total, inputs)) = grad_and_value(mean_loss, has_aux=True)((weights, zeros))
        sums = [total]
        if zeros:
            squares = torch.stack(list(map(squared_norms, inputs, of_outputs))).sum()
            sums += [squares.to(total.dtype), torch.zeros_like(total)]
        return list(gradients.values()), torch.stack(sums)

    def _adam(self, gradients: list[Tensor]) -> None:
        options = self.options
        beta1, beta2 = options["betas"]
        # Double, so that beta ** count is not rounded to float32. All weights have one count, so that the compiler
        # computes once what follows from it.
        counts = [self.state["step"][0].double() for _ in self.state["step"]]
        adam(list(self.weights.values()), gradients, self.state["exp_avg"], self.state["exp_avg_sq"], [], counts,
             foreach=False, fused=False, capturable=self.device.type == "cuda",
             amsgrad=options["amsgrad"], beta1=beta1, beta2=beta2, lr=options["lr"], eps=options["eps"],
             weight_decay=options["weight_decay"], maximize=options["maximize"])
        for kept, count in zip(self.state["step"], counts, strict=True):
            kept.copy_(count)

    def _whole_step(self, rows_B: Tensor, count: Tensor) -> Tensor:
        gradients, sums = self._gradients(self.weights, rows_B, count)
        if self.outputs:
            sums[2] = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        self._adam(gradients)
        return sums

    def _accumulate_gradient(self, rows_B: Tensor, count: Tensor) -> Tensor:
        gradients, sums = self._gradients(self.weights, rows_B, count)
        self.flat.add_(torch.cat([gradient.flatten() for gradient in gradients]))
        return sums

    def _apply_gradient(self) -> Tensor | None:
        square = self.flat.square().sum() / self.team.size  # every rank has the same, and they are added
        sizes = [weight.numel() for weight in self.weights.values()]
        parts = zip(self.flat.split(sizes), self.weights.values(), strict=True)
        self._adam([part.view_as(weight) for part, weight in parts])
        self.flat.zero_()
        return torch.stack([torch.zeros_like(square), torch.zeros_like(square), square]) if self.outputs else None

    def _one(self, rows: Sequence[Tensor], count: Tensor) -> list[Tensor]:
        """A step on the parts' `rows`; its sums, in parts. Collective."""
        if self.flat is None:
            if self.contention.active and self._may_take_one_thread(rows[0], count):
                with one_thread():
                    return [self._whole(rows[0], count)[0]]
            return [self._whole(rows[0], count)[0]]
        totals = [self._accumulate(row, count)[0] for row in rows]
        self.team.sum(self.flat)
        return [*totals, *self._apply()]

    def _may_take_one_thread(self, rows: Tensor, count: Tensor) -> bool:
        """Whether a step has the same bits with one thread. It is tried once; the weights do not change."""
        if self.same_bits_with_one_thread is None:
            tensors = [*self.weights.values(), *(tensor for kept in self.state.values() for tensor in kept)]
            before, outcomes = [tensor.clone() for tensor in tensors], []
            for threads in (nullcontext(), one_thread()):
                with threads:
                    sums = self._whole(rows, count)[0]
                outcomes.append([tensor.clone() for tensor in (sums, *tensors)])
                for tensor, kept in zip(tensors, before, strict=True):
                    tensor.copy_(kept)
            self.same_bits_with_one_thread = all(map(torch.equal, *outcomes))
        return self.same_bits_with_one_thread

    def begin(self, epoch: int, steps: range) -> None:
        """Go to these steps of the epoch."""
        begin = time.perf_counter()
        self.rows = self.batches.rows(self.in_pass, epoch).unbind()
        self.waited = time.perf_counter() - begin

    @torch.no_grad()
    def take(self, steps: range, lap: Lap = no_lap) -> None:
        """Optimizer steps. The first one of an epoch has waited for the order of the samples. Collective."""
        for step in steps:
            self.take_one(step)
            lap((self.batches.count(step),), self.waited)
            self.waited = 0.0

    def take_one(self, step: int) -> None:
        """One optimizer step. Collective."""
        is_last = step == self.batches.num_batches - 1
        rows: Sequence[Tensor] = self.rows[step * self.parts : (step + 1) * self.parts]
        if is_last and self.flat is not None:
            rows = [row for row in rows if row[0] != NO_INDEX]
            self.recorded += [torch.zeros(3 if self.outputs else 1, dtype=self.dtype)] * (self.parts - len(rows))
        self.recorded += self._one(rows, self.last if is_last else self.full)

    def flush(self, step: int) -> None:
        """The sums recorded before step `step` go to their place."""
        if self.recorded:
            parts = self.parts + bool(self.outputs and self.flat is not None)
            recorded = torch.stack(self.recorded)
            sums = recorded.view(-1, parts, recorded.shape[1]).sum(dim=1, dtype=torch.float64)
            self.sums[: sums.shape[1], step - len(sums) : step] += sums.T
            self.recorded.clear()

    def pause(self) -> None:
        """Nothing to do: the weights are up to date."""
