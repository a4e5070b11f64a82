"""What is measured: the rows of the tables, the sizes of their batches, and how each is started. Pure."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EPOCH_IMAGES = 60_000
OURS = {1: "mnist_dist", 2: "mnist_dist_2"}  # by number of processes
LIMIT = "limit"
BATCH_SIZES = {1: (1, 32, 200, 1000, 8192), 2: (32, 200, 1000, 2000, 8192)}
QUICK_BATCH_SIZES = {1: (1, 200), 2: (200,)}


@dataclass(frozen=True)
class Row:
    """A row: its name, what a table says of it, and the module that runs it, None for `mnist-dist train`. `arguments`
    are further words of its command.
    """

    name: str
    title: str
    module: str | None
    arguments: tuple[str, ...] = ()
    processes: int = 1
    needs_gpu: bool = False

    def command(self, data_dir: str, batch_size: int, num_samples: int) -> list[str]:
        """The command of a peer or of the limit; its last line of output is its JSON."""
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes), "-m"]
        return [sys.executable, "-m", *(launcher if self.processes > 1 else []), f"benchmarks.{self.module}", data_dir,
                str(batch_size), str(num_samples), *self.arguments]


ROWS = (
    Row("mnist_dist", "**mnist-dist train**", None),
    Row("mnist_dist_plain", "mnist-dist train --compile off", None, ("--compile", "off")),
    Row("mnist_dist_fused", "mnist-dist train --compile fused", None, ("--compile", "fused"), needs_gpu=True),
    Row("mnist_dist_bf16", "mnist-dist train --mixed-precision bf16", None, ("--mixed-precision", "bf16")),
    Row("tutorial", "the 2019 tutorial's loop", "peers.tutorial"),
    Row("lightning", "Lightning", "peers.lightning"),
    Row("plain_accelerate", "plain Accelerate loop", "peers.plain_accelerate"),
    Row("sklearn", "scikit-learn MLPClassifier (ReLU: it has no LeakyReLU)", "peers.sklearn"),
    Row("pytorch", "hand-written PyTorch, tensors in memory", "peers.pytorch"),
    Row("pytorch_compiled", "PyTorch, whole step compiled", "peers.pytorch_compiled", ("1",)),
    Row("pytorch_compiled_4", "the same, 4 steps per call", "peers.pytorch_compiled", ("4",)),
    Row("pytorch_autotune", 'PyTorch, whole step compiled, mode="max-autotune"', "peers.pytorch_compiled", ("1", "1"),
        needs_gpu=True),
    Row("pytorch_graph", "hand-written PyTorch, the step as a CUDA graph", "peers.pytorch_graph", needs_gpu=True),
    Row("jax_scan", "JAX, jit and scan over the epoch", "peers.jax_scan"),
    Row(LIMIT, "the machine: matrix products and Adam alone", "limit"),
    Row("mnist_dist_2", "**mnist-dist train --processes 2**", None, processes=2),
    Row("ddp", "hand-written DistributedDataParallel", "peers.ddp", processes=2),
)
BY_NAME = {row.name: row for row in ROWS}


def num_samples(batch_size: int, quick: bool) -> int:
    """Images of a peer's epoch: a tenth of MNIST if a step is one image, else all of it; less if quick."""
    if batch_size == 1:
        return 1000 if quick else EPOCH_IMAGES // 10
    return 12_000 if quick else EPOCH_IMAGES


def schedule(rows: Sequence[Row], batch_sizes: Mapping[int, Sequence[int]], repeats: int
             ) -> list[tuple[int, Row, int]]:
    """(repeat, row, batch size) in the order of measurement: rows of a batch size take turns, shuffled by a seed."""
    order = []
    for repeat in range(repeats):
        generator = random.Random(repeat)
        for processes, sizes in batch_sizes.items():
            group = [row for row in rows if row.processes == processes]
            for batch_size in sizes:
                order += [(repeat, row, batch_size) for row in generator.sample(group, len(group))]
    return order
