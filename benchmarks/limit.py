"""How fast this machine could be: the step's matrix products alone, then Adam's pass over the parameters alone.

    python -m benchmarks.limit DATA_DIR BATCH_SIZE NUM_SAMPLES

Speaks the peers' protocol; the images are not read. On a CPU the products are those of the fastest library on this
machine (benchmarks/products.py). They have their operands and results in place already, which a training step has not;
on a GPU a CUDA graph of many calls leaves out what launching costs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.common import line, pick_device, start
from benchmarks.products import HIDDEN, INPUTS, MKL, OUTPUTS, fastest, in_turn, step_products
from mnist_dist.training.model import num_parameters

CALLS_IN_GRAPH = 100
BLOCKS, BLOCK_SECONDS = 15, 0.02  # the median is over blocks of calls, each long enough for the clock


def adam(device: torch.device) -> Callable[[], None]:
    """Adam's fused kernel over all parameters as one flat tensor."""
    size = num_parameters((INPUTS, HIDDEN, OUTPUTS))
    weights, gradient, mean = (torch.randn(size, device=device) / 100 for _ in range(3))
    square, count = torch.rand(size, device=device), torch.ones((), device=device)

    def run() -> None:
        torch._fused_adam_([weights], [gradient], [mean], [square], [], [count], lr=1e-4, beta1=0.9, beta2=0.999,
                           weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)

    return run


def seconds_per_call(call: Callable[[], None], device: torch.device) -> float:
    """The median over blocks of calls."""
    in_one = 1
    if device.type == "cuda":
        call()
        torch.cuda.synchronize()
        graph, in_one = torch.cuda.CUDAGraph(), CALLS_IN_GRAPH
        with torch.cuda.graph(graph):
            for _ in range(in_one):
                call()
        call = graph.replay

    def block(calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls / in_one

    block(3)
    calls = max(1, round(BLOCK_SECONDS / block(3) / in_one))
    return statistics.median(block(calls) for _ in range(BLOCKS))


@torch.no_grad()
def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Time both parts; an epoch has samples over batch size of the products, and Adam once in each step."""
    device, begin = pick_device(), time.perf_counter()
    if device.type == "cpu":
        libraries, multiply = fastest(batch_size)
    else:  # torch.mm is cuBLAS
        libraries, multiply = [], in_turn(step_products(batch_size, device), [MKL] * 5)
    matmul = seconds_per_call(multiply, device) * num_samples / batch_size
    update = seconds_per_call(adam(device), device) * math.ceil(num_samples / batch_size)
    return line(num_samples, matmul + update, time.perf_counter() - begin, f"torch {torch.__version__}", device.type,
                matmul_seconds=matmul, adam_seconds=update) | {"libraries": libraries}


if __name__ == "__main__":
    start(main)
