"""The whole optimizer step as one compiled function: gather, scaling, forward, loss, backward and Adam.

It runs on the weights of the model and the moments of the optimizer that Accelerate wraps, through the model's own
forward, `loss_sum` and PyTorch's own Adam, so that the mathematics is written once. With several ranks or
passes it is two functions, with one flat gradient between them. docs/performance.md has the measurements.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.optim.adam import adam

from mnist_dist.disk.files import make_folder, real
from mnist_dist.errors import UserError
from mnist_dist.processes.neighbours import one_thread
from mnist_dist.record.environment import processor_kind
from mnist_dist.record.gains import user_cache
from mnist_dist.text import first_line
from mnist_dist.training.noise_scale import squared_norms
from mnist_dist.training.sampling import NO_INDEX
from mnist_dist.training.steps.plain import NO_SAMPLE, loss_sum
from mnist_dist.training.steps.step import Lap, StepParts, no_lap

# Adam's bias corrections are scalars, which inductor would otherwise compute again for every vector of 16 weights: this
# makes it keep them, and halves a step at batch 1 (its default is 30). With 4, scaling the images takes two passes
# over them. And each call need not see whether all tensors have their shapes: they are the same tensors.
INDUCTOR_OPTIONS = {"realize_opcount_threshold": 7, "size_asserts": False}

# On the CPU a larger batch is taken in parts of about so many samples, so that the last batch of an epoch is padded by
# a part at most, and not to a whole batch.
PART = 1024

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # environment variable: inductor's cache

# Exceptions of torch: there is no compiler, or it fails. By name, because they differ between versions.
NO_COMPILER = {"CppCompileError", "InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton"}


def compiler_failure(error: BaseException) -> str | None:
    """What a user can do about an exception of torch.compile; None if it is a bug, here or in torch."""
    while error is not None:  # torch wraps what it catches
        if NO_COMPILER & {kind.__name__ for kind in type(error).__mro__}:
            return "install a C++ compiler such as g++ (on a GPU: triton), or give --compile off"
        if isinstance(error, OSError):  # of the compiler's process or its cache
            return "check that the compiler runs and that its cache can be written, or give --compile off"
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return None


def keep_compiled_code() -> None:
    """Have inductor keep its code in the user's cache: its own folder for temporary files is lost when a machine starts
    again. One folder for each kind of processor, for which the code is made: machines may share the user's files.
    """
    if not os.environ.get(CACHE):
        with suppress(OSError):
            folder = real(user_cache()) / "compiled" / processor_kind()
            make_folder(folder)
            os.environ[CACHE] = str(folder)


def inductor_options(onednn_from: int | None = None) -> dict[str, Any]:
    """How inductor compiles a step."""
    from mnist_dist.training.steps.graph_pass import GraphPass  # which imports inductor

    return {"post_grad_custom_pre_pass": GraphPass(onednn_from), **INDUCTOR_OPTIONS}


def compile_graph(graph: Any, examples: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """Inductor's code for a graph. It is trusted that the C++ compiler knows the vector instructions of the processor:
    inductor compiles a program for each of them to see that, which takes a third of a first start.
    """
    try:
        return torch._inductor.compile(graph, examples, options={**options, "cpp.vec_isa_ok": True})
    except Exception as error:
        if compiler_failure(error) is None:
            raise
        from torch._inductor import cpu_vec_isa

        with suppress(AttributeError):  # what inductor remembers of them, as torch 2.6 to 2.15 have it
            cpu_vec_isa.valid_vec_isa_list.cache_clear()
            for kind in {kind for isa in cpu_vec_isa.supported_vec_isa_list for kind in type(isa).__mro__}:
                getattr(vars(kind).get("__bool__"), "cache_clear", bool)()
        return torch._inductor.compile(graph, examples, options=options)


def compile_once(function: Callable[..., Tensor | None], *varying: Tensor, onednn_from: int | None = None
                 ) -> Callable[..., Sequence[Tensor]]:
    """`function`, which returns a tensor or nothing, compiled for arguments like `varying`, without being run.

    A function that torch.compile returns checks everything that it refers to at each call; at batch 1 this takes longer
    than the step. Here all of that are tensors that stay the same, so the compiled graph is called directly, with these
    tensors and the arguments that vary.
    """
    # on a machine without a GPU it logs a warning about that
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    captured: dict[str, Any] = {}
    torch.compiler.reset()  # otherwise it counts as a recompilation of a function compiled earlier in this process

    def backend(graph: Any, examples: Any) -> Callable[..., list[Tensor]]:
        captured["graph"] = compile_graph(graph, examples, inductor_options(onednn_from))

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
    """The interface of `Step`. Images must be in the device's memory; the epoch's order is copied there.

    Raises `UserError` if there is no compiler, or it fails.
    """

    kind = "compiled"

    def __init__(self, parts: StepParts) -> None:
        self.team, self.images, self.batches = parts.team, parts.images, parts.batches
        self.sums, self.dtype, self.device = parts.sums, parts.dtype, parts.team.device
        self.neighbours, self.onednn_from = parts.neighbours, parts.onednn_from
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
        # None: not tried yet. Of more than two threads, one is too few: the others have more than one core left
        self.same_bits_with_one_thread = None if torch.get_num_threads() == 2 else False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.epoch, self.ahead = 0, dict[int, Tensor]()  # the order of a later epoch, made beforehand
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

        # the gradient of an output is that of something that is added to it: of zeros, which cost nothing
        zeros = [images_B1HW.new_zeros(len(rows_B), size, dtype=self.dtype) for size in self.outputs]

        def mean_loss(both: tuple[dict[str, Tensor], list[Tensor]]) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
            """The mean over the batch, and beside it what is wanted of its making: the sum, and the layers' inputs."""
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
        square = self.flat.square().sum() / self.team.size  # every rank has it, and they are added up
        sizes = [weight.numel() for weight in self.weights.values()]
        parts = zip(self.flat.split(sizes), self.weights.values(), strict=True)
        self._adam([part.view_as(weight) for part, weight in parts])
        self.flat.zero_()
        return torch.stack([torch.zeros_like(square), torch.zeros_like(square), square]) if self.outputs else None

    @torch.no_grad()
    def record(self) -> None:
        """On a GPU: record the step as a CUDA graph, which a replay runs without the host. Collective: the graph holds
        an all-reduce, so that every rank records at the same time, after all have compiled.

        The graph finds its batch by a cursor in the GPU's memory, and adds its loss to the losses there. CUDA
        loads code at the first run and must not do so while recording; an empty batch changes only Adam's step counts.
        """
        steps = self.batches.num_batches
        self.order = self.batches.rows().view(steps, self.parts, -1).to(self.device).fill_(NO_INDEX)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.count_of = self.full.repeat(steps)
        self.count_of[-1] = self.last
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step_at_cursor()
        torch.cuda.current_stream().wait_stream(side)
        self.team.wait_for_device()
        self.graph = torch.cuda.CUDAGraph()
        # NCCL's communicator cannot end while a graph that holds its operations is alive
        self.team.before_end(self.graph.reset)
        with torch.cuda.graph(self.graph):
            self._step_at_cursor()
        for count in self.state["step"]:
            count.zero_()
        torch.cuda.reset_peak_memory_stats()  # the compiler's trials are no part of training

    def _step_at_cursor(self) -> None:
        rows_PB = self.order.index_select(0, self.cursor)[0]
        totals = self._one(rows_PB.unbind(), self.count_of.index_select(0, self.cursor)[0])
        total = torch.stack(totals).sum(dim=0, dtype=torch.float64)
        self.sums[: len(total)].index_add_(1, self.cursor, total.unsqueeze(1))
        self.cursor.add_(1)

    def _one(self, rows: Sequence[Tensor], count: Tensor) -> list[Tensor]:
        """A step on the parts' `rows`; its sums, in parts. Collective."""
        if self.flat is None:
            if self.neighbours.are_there and self._may_take_one_thread(rows[0], count):
                with one_thread():
                    return [self._whole(rows[0], count)[0]]
            return [self._whole(rows[0], count)[0]]
        totals = [self._accumulate(own, count)[0] for own in rows]
        self.team.sum(self.flat)
        return [*totals, *self._apply()]

    def _may_take_one_thread(self, rows: Tensor, count: Tensor) -> bool:
        """Whether a step has the same bits with one thread. It is tried once, and the weights are then as before."""
        if self.same_bits_with_one_thread is None:
            tensors = [*self.weights.values(), *(tensor for kept in self.state.values() for tensor in kept)]
            before, found = [tensor.clone() for tensor in tensors], []
            for threads in (nullcontext(), one_thread()):
                with threads:
                    sums = self._whole(rows, count)[0]
                found.append([tensor.clone() for tensor in (sums, *tensors)])
                for tensor, kept in zip(tensors, before, strict=True):
                    tensor.copy_(kept)
            self.same_bits_with_one_thread = all(map(torch.equal, *found))
        return self.same_bits_with_one_thread

    def begin(self, epoch: int, steps: range) -> None:
        """Go to these steps of the epoch: its order is copied to the device."""
        begin = time.perf_counter()
        rows = self.ahead.pop(epoch, None)
        if rows is None:
            rows = self._order_of(epoch)
        self.epoch = epoch
        if self.graph:
            self.order.copy_(rows.view_as(self.order), non_blocking=True)
            self.cursor.fill_(steps.start)
        else:
            self.rows = rows.unbind()
        self.waited = time.perf_counter() - begin

    def _order_of(self, epoch: int) -> Tensor:
        self.batches.go_to(epoch, range(self.batches.num_batches))
        return self.batches.rows(self.in_pass)

    @torch.no_grad()
    def take(self, steps: range, lap: Lap = no_lap) -> None:
        """Optimizer steps. The first one of an epoch has waited for the order of the samples. Collective."""
        for step in steps:
            self.take_one(step)
            lap(self.batches.count(step), self.waited)
            self.waited = 0.0
        if self.graph and steps.stop == self.batches.num_batches:
            # the host has time while the GPU takes the steps
            self.ahead = {self.epoch + 1: self._order_of(self.epoch + 1)}

    def take_one(self, step: int) -> None:
        """One optimizer step. Collective."""
        if self.graph:
            self.graph.replay()
            return
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
