"""The whole optimizer step as one compiled function: gather, scaling, forward, loss, backward and Adam.

It runs on the weights of the model and the moments of the optimizer that Accelerate wraps, through the model's own
forward, `steps.loss_sum` and PyTorch's own Adam, so that there is no second copy of the mathematics. With several
processes or passes it is two functions, with one flat gradient between them. docs/performance.md has the measurements.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.optim.adam import adam

from mnist_dist.config import TrainConfig
from mnist_dist.data import Images
from mnist_dist.errors import UserError
from mnist_dist.sampling import NO_INDEX, GlobalBatchSampler
from mnist_dist.steps import NO_SAMPLE, loss_sum

# On two cores a step saves 0.7 to 0.9 ms at any batch size, and compiling costs 2 s where its cache is warm, 6 s where
# it is not, 12 s on a machine's first time: 2,000 to 17,000 steps pay for it (docs/performance.md).
WORTH_COMPILING_STEPS = 5000
# Adam's bias corrections are scalars, which inductor would otherwise compute again for every vector of 16 weights: this
# makes it keep them, and halves a step at batch 1 (its default is 30).
INDUCTOR_OPTIONS = {"realize_opcount_threshold": 4}


def is_wanted(config: TrainConfig, images: Images, batches: GlobalBatchSampler, accelerator: Accelerator,
              before: str | None = None) -> bool:
    """Whether this run's step is to be compiled: as asked, and with `auto` where it pays for itself within the run.

    A run that is continued takes the kind of step that it took `before`: its bits depend on it. Until it has been
    measured on a GPU, `auto` is for the CPU. Raises `UserError`.
    """
    if accelerator.mixed_precision == "fp16" and config.compile == "on":  # also where the launcher says so
        raise UserError("--compile on and mixed precision fp16 exclude each other: drop one")
    if config.compile == "on" and not images.is_resident:
        raise UserError("--compile on needs the images in the GPU's memory, and they are more than half of what is "
                        "free: give --compile off")
    if config.compile != "auto":
        return config.compile == "on"
    if accelerator.device.type != "cpu" or accelerator.mixed_precision == "fp16" or config.clashes_with_compile:
        return False
    if before is not None:
        return before == "compiled"
    return min(config.epochs * batches.num_batches, config.max_steps or math.inf) >= WORTH_COMPILING_STEPS


def compile_once(function: Callable[..., Tensor | None], *varying: Tensor) -> Callable[..., Sequence[Tensor]]:
    """`function`, which returns a tensor or nothing, compiled for arguments like `varying`, without being run.

    torch.compile's entry looks at all that a function refers to each time that it is called, which at batch 1 costs
    more than the step itself. What it refers to are tensors that stay, so the compiled graph is called directly, with
    the tensors that it was compiled for and, in their places, the arguments that vary.
    """
    # on a machine without a GPU it would tell everyone that there is none
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    captured: dict[str, object] = {}
    torch.compiler.reset()  # of what was compiled in this process before: it would count as this function again

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., list[Tensor]]:
        captured["graph"] = torch._inductor.compile(graph, examples, options=INDUCTOR_OPTIONS)

        def remember(*inputs: Tensor) -> list[Tensor]:
            captured["inputs"] = inputs
            return [torch.zeros(()) for _ in graph.graph.output_node().args[0]]

        return remember

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*varying)
    compiled, inputs = captured["graph"], list(captured["inputs"])
    places = [next(i for i, tensor in enumerate(inputs) if tensor is argument) for argument in varying]

    def call(*arguments: Tensor) -> Sequence[Tensor]:
        for place, argument in zip(places, arguments, strict=True):
            inputs[place] = argument
        return compiled(*inputs)

    return call


class CompiledStep:
    """The interface of `steps.PlainStep`. Images must be in the device's memory; the epoch's order is copied there."""

    kind = "compiled"

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimizer: AcceleratedOptimizer, images: Images,
                 batches: GlobalBatchSampler, losses: Tensor, dtype: torch.dtype) -> None:
        self.module, self.images, self.batches = module, images, batches
        self.losses, self.dtype = losses, dtype
        self.num_processes, self.device = accelerator.num_processes, accelerator.device
        # without autograd's bookkeeping, on the same memory
        self.weights = {name: weight.detach() for name, weight in module.named_parameters()}
        self.options = optimizer.optimizer.param_groups[0]
        state = [optimizer.optimizer.state[weight] for weight in module.parameters()]
        self.state = {name: [kept[name] for kept in state] for name in ("step", "exp_avg", "exp_avg_sq")}
        self.recorded: list[Tensor] = []  # the loss sums of steps taken since `finish`
        numbers = (batches.count(0), batches.count(batches.num_batches - 1))  # of samples in a global batch
        self.full, self.last = (torch.tensor(float(number), dtype=dtype, device=self.device) for number in numbers)
        self._in_two = self.num_processes > 1 or batches.passes > 1
        self.flat = torch.zeros(sum(weight.numel() for weight in self.weights.values()), dtype=dtype,
                                device=self.device) if self._in_two else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self._compile()

    def _compile(self) -> None:
        """Raises `UserError` where there is no compiler, or it fails."""
        begin = time.perf_counter()
        rows = self.batches.rows()[0].to(self.device)
        try:
            if self._in_two:
                self._accumulate = compile_once(self._accumulate_gradient, rows, self.full)
                self._apply = compile_once(self._apply_gradient)
            else:
                self._whole = compile_once(self._whole_step, rows, self.full)
            if self.device.type == "cuda":
                self._record()
        except Exception as error:  # whatever stands in the compiler's way, the plain step is there
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"the step could not be compiled ({reason[0]}): install a C++ compiler such as g++, or "
                            "give --compile off") from error
        self.compile_seconds = time.perf_counter() - begin

    def _gradients(self, rows_B: Tensor, count: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gradients of these samples' part of the mean over `count` samples, and their loss sum."""
        labels_B = self.images.labels[rows_B].masked_fill(rows_B == NO_INDEX, NO_SAMPLE)
        images_B1HW = self.images.images[rows_B]

        def mean_loss(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            total = loss_sum(lambda x: functional_call(self.module, weights, (x,)), images_B1HW, labels_B, self.dtype)
            return total / count, total

        gradients, (_, total) = grad_and_value(mean_loss, has_aux=True)(self.weights)
        return list(gradients.values()), total

    def _adam(self, gradients: list[Tensor]) -> None:
        options = self.options
        beta1, beta2 = options["betas"]
        counts = [count.double() for count in self.state["step"]]  # so that beta ** count is not rounded to float32
        adam(list(self.weights.values()), gradients, self.state["exp_avg"], self.state["exp_avg_sq"], [], counts,
             foreach=False, fused=False, capturable=self.device.type == "cuda",
             amsgrad=options["amsgrad"], beta1=beta1, beta2=beta2, lr=options["lr"], eps=options["eps"],
             weight_decay=options["weight_decay"], maximize=options["maximize"])
        for kept, count in zip(self.state["step"], counts, strict=True):
            kept.copy_(count)

    def _whole_step(self, rows_B: Tensor, count: Tensor) -> Tensor:
        gradients, total = self._gradients(rows_B, count)
        self._adam(gradients)
        return total

    def _accumulate_gradient(self, rows_B: Tensor, count: Tensor) -> Tensor:
        gradients, total = self._gradients(rows_B, count)
        self.flat.add_(torch.cat([gradient.flatten() for gradient in gradients]))
        return total

    def _apply_gradient(self) -> None:
        sizes = [weight.numel() for weight in self.weights.values()]
        parts = zip(self.flat.split(sizes), self.weights.values(), strict=True)
        self._adam([part.view_as(weight) for part, weight in parts])
        self.flat.zero_()

    @torch.no_grad()
    def _record(self) -> None:
        """On a GPU: record the step as a CUDA graph, which a replay runs without the host.

        The graph finds its batch by a cursor in the GPU's memory, and adds its loss to the losses there. What CUDA
        loads at a first run it may not load while recording; an empty batch moves nothing but Adam's step counts.
        """
        passes, steps = self.batches.passes, self.batches.num_batches
        self.order = self.batches.rows().view(steps, passes, -1).to(self.device).fill_(NO_INDEX)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.count_of = self.full.repeat(steps)
        self.count_of[-1] = self.last
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step_at_cursor()
        torch.cuda.current_stream().wait_stream(side)
        for count in self.state["step"]:
            count.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step_at_cursor()

    def _step_at_cursor(self) -> None:
        rows_PB = self.order.index_select(0, self.cursor)[0]
        totals = self._one(rows_PB.unbind(), self.count_of.index_select(0, self.cursor)[0])
        self.losses.index_add_(0, self.cursor, torch.stack(totals).sum(dtype=torch.float64).view(1))
        self.cursor.add_(1)

    def _one(self, rows: Sequence[Tensor], count: Tensor) -> list[Tensor]:
        """A step on the passes' `rows`; their loss sums. Collective."""
        if not self._in_two:
            return [self._whole(rows[0], count)[0]]
        totals = [self._accumulate(own, count)[0] for own in rows]
        if self.num_processes > 1:
            dist.all_reduce(self.flat)
        self._apply()
        return totals

    def begin(self, epoch: int, steps: range) -> None:
        """Go to these steps of the epoch: its order is copied to the device."""
        begin = time.perf_counter()
        self.batches.sampler.set_epoch(epoch)
        rows = self.batches.rows()
        if self.graph:
            self.order.copy_(rows.view_as(self.order), non_blocking=True)
            self.cursor.fill_(steps.start)
        else:
            self.rows = rows.unbind()
        self.waited = time.perf_counter() - begin

    @torch.no_grad()
    def take(self, step: int) -> float:
        """One optimizer step; returns the seconds waited for data: those of the order, at the first step."""
        if self.graph:
            self.graph.replay()
        else:
            count = self.full if step < self.batches.num_batches - 1 else self.last
            passes = self.batches.passes
            self.recorded += self._one(self.rows[step * passes : (step + 1) * passes], count)
        waited, self.waited = self.waited, 0.0
        return waited

    def finish(self, step: int) -> None:
        """End a stretch before step `step`: the recorded losses go to where they are summed up."""
        if self.recorded:
            sums = torch.stack(self.recorded).view(-1, self.batches.passes).sum(dim=1, dtype=torch.float64)
            self.losses[step - len(sums) : step] += sums
            self.recorded.clear()

    def pause(self) -> None:
        """Somebody is to look at the weights: they are as they should be."""
