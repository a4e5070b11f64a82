"""The compiled step as a CUDA graph: the host starts a whole step with one call."""

from __future__ import annotations

import time

import torch

from mnist_dist.training.sampling import NO_INDEX
from mnist_dist.training.steps.ahead import Ahead
from mnist_dist.training.steps.compiled import CompiledStep
from mnist_dist.training.steps.step import StepParts


class GraphStep(CompiledStep):
    """A `CompiledStep` on a GPU, after `record`. The order of an epoch is copied to the GPU once."""

    def __init__(self, parts: StepParts) -> None:
        super().__init__(parts)
        self.ahead = Ahead(lambda epoch: self.batches.rows(epoch=epoch))

    @torch.no_grad()
    def record(self) -> None:
        """Record the step as a CUDA graph, which a replay runs without the host. Collective: the graph holds
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
        torch.cuda.reset_peak_memory_stats()  # what the compiler used is not the run's

    def _step_at_cursor(self) -> None:
        rows_PB = self.order.index_select(0, self.cursor)[0]
        totals = self._one(rows_PB.unbind(), self.count_of.index_select(0, self.cursor)[0])
        total = torch.stack(totals).sum(dim=0, dtype=torch.float64)
        self.sums[: len(total)].index_add_(1, self.cursor, total.unsqueeze(1))
        self.cursor.add_(1)

    def begin(self, epoch: int, steps: range) -> None:
        """Go to these steps of the epoch: its order is copied to the device."""
        begin = time.perf_counter()
        self.order.copy_(self.ahead.of(epoch).view_as(self.order), non_blocking=True)
        self.cursor.fill_(steps.start)
        self.waited = time.perf_counter() - begin

    def take_one(self, step: int) -> None:
        """One optimizer step. Collective."""
        self.graph.replay()
