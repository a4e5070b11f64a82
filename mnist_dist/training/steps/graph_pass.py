"""A pass over inductor's graph of a step, for the CPU: it fits the products to Adam's loops.

Adam's loop over a weight gives each thread a block of its rows, which stay in the cache of that thread's core. MKL
shares the weight's products out in other ways, or not at all. So at small batches the weight and its gradient move from
core to core in each step, which takes longer than the products (docs/performance.md). Hence, for a large weight, its
gradient and the activations from it become one product for each thread's block of rows. The gradient of a small weight
becomes one for each block of columns, because it has few rows.

Then, up to `MOST_SAMPLES` and where the threads divide the blocks evenly, MKL shares out no product in its own way. So
the step has the same bits with one thread, which it takes beside busy processes (compiled.py).

On processors on which MKL is slow, large products are oneDNN's instead (cpu_products.py). oneDNN shares them out by the
number of threads.

Small products become loops of inductor's own, which it joins to the loops before and after them. MKL is slow at
products with ten columns, as the second layer's are, and a call of it takes longer than a product with few samples.
Then Adam's loop computes the gradient of a large weight itself, which does not go through memory; from one sample on
a GPU too.

Adam divides by its bias correction for each weight. A product with the reciprocal of that number takes less time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mnist_dist.training.steps.cpu_products import product

aten = torch.ops.aten

# An operator of our own: inductor would copy the transposed operands of PyTorch's operator for oneDNN.
library = torch.library.Library("mnist_dist", "DEF")
library.define("product(Tensor left_MK, Tensor right_NK) -> Tensor")
library.impl("product", product, "CPU")
library.impl("product", lambda left_MK, right_NK: left_MK.new_empty(len(left_MK), len(right_NK)), "Meta")

# Weights with at least this number of elements are large. For more samples than this MKL's own way is as fast.
LARGE_WEIGHT, MOST_SAMPLES = 100_000, 512

# Inductor's loop reads the right operand once for each row of the left one. It is faster than MKL, which reads blocks,
# up to SMALL_PRODUCT multiplications, with that operand inside the L1 cache (FIRST_CACHE bytes) and several threads.
SMALL_PRODUCT, FIRST_CACHE = 5_000_000, 32 * 1024


def value(node: Any) -> Tensor:
    """The node's fake tensor: its shape, type and device."""
    return node.meta["val"]


def add(graph: Graph, operation: Any, *inputs: Any) -> Node:
    """A new node."""
    node = graph.call_function(operation, inputs)
    node.meta["val"] = operation(*map_arg(inputs, value))
    return node


class GraphPass(CustomGraphPass):
    """The pass, for as many threads as there are when it is made."""

    def __init__(self, onednn_from: int | None = None) -> None:
        self.threads, self.onednn_from = torch.get_num_threads(), onednn_from

    def __call__(self, graph: Graph) -> None:
        self._replace_products(graph)
        self._replace_divisions(graph)

    def uuid(self) -> bytes:
        """A part of the key under which compiled code is kept."""
        return get_hash_for_files((__file__,), f"{type(self).__name__} {self.threads} {self.onednn_from}")

    def _replace_products(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            (rows, samples), is_small = value(node.args[0]).shape, self._is_small(*node.args)
            if self._is_onednns(*node.args):
                _replace(node, _product)
            elif samples == 1 or is_small:
                _replace(node, _loop)
            elif self._cuts(node, rows, samples, is_large=True):
                _replace(node, self._gradient)
            elif self._cuts(node, value(node).shape[1], samples, is_large=False):
                _replace(node, self._small_gradient)
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            (samples, rows), is_small = value(node).shape, self._is_small(*node.args[1:])
            if self._is_onednns(*node.args[1:]):
                _replace(node, lambda graph, bias, *both: add(graph, aten.add.Tensor, _product(graph, *both), bias))
            elif (samples == 1 and _is_on_cpu(node)) or is_small:
                _replace(node, lambda graph, bias, *both: add(graph, aten.add.Tensor, _loop(graph, *both), bias))
            elif self._cuts(node.args[2], rows, samples, is_large=True):
                _replace(node, self._activations)

    def _replace_divisions(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
            divisor = node.args[1]
            if isinstance(divisor, Node) and value(divisor).dim() == 0 < value(node).dim() and _is_on_cpu(node):
                _replace(node, _times_reciprocal)

    def _is_onednns(self, left_MK: Node, right_KN: Node) -> bool:
        return self.onednn_from is not None and _multiplications(left_MK, right_KN) >= self.onednn_from

    def _is_small(self, left_MK: Node, right_KN: Node) -> bool:
        return (_is_on_cpu(left_MK) and self.threads > 1 and _multiplications(left_MK, right_KN) <= SMALL_PRODUCT
                and value(right_KN).nbytes <= FIRST_CACHE)

    def _cuts(self, weight: Node, length: int, samples: int, *, is_large: bool) -> bool:
        return (_is_on_cpu(weight) and value(weight).dtype in (torch.float32, torch.float64) and self.threads > 1
                and length % self.threads == 0 and (value(weight).numel() >= LARGE_WEIGHT) == is_large
                and samples <= MOST_SAMPLES)

    def _gradient(self, graph: Graph, left_NB: Node, right_BK: Node) -> Node:
        """[N, K], from T threads' blocks of n = N / T rows."""
        (N, B), K = value(left_NB).shape, value(right_BK).shape[1]
        left_TnB = add(graph, aten.reshape.default, left_NB, [self.threads, N // self.threads, B])
        right_TBK = add(graph, aten.expand.default, right_BK, [self.threads, B, K])
        return add(graph, aten.reshape.default, add(graph, aten.bmm.default, left_TnB, right_TBK), [N, K])

    def _small_gradient(self, graph: Graph, left_NB: Node, right_BK: Node) -> Node:
        """[N, K], from T threads' blocks of k = K / T columns."""
        (N, B), K = value(left_NB).shape, value(right_BK).shape[1]
        right_BTk = add(graph, aten.reshape.default, right_BK, [B, self.threads, K // self.threads])
        right_TBk = add(graph, aten.permute.default, right_BTk, [1, 0, 2])
        y_TNk = add(graph, aten.bmm.default, add(graph, aten.expand.default, left_NB, [self.threads, N, B]), right_TBk)
        return add(graph, aten.reshape.default, add(graph, aten.permute.default, y_TNk, [1, 0, 2]), [N, K])

    def _activations(self, graph: Graph, bias_N: Node, x_BK: Node, weight_KN: Node) -> Node:
        """[B, N], from T threads' blocks of n = N / T columns, which are rows of the weight as it is kept."""
        B, (K, N) = value(x_BK).shape[0], value(weight_KN).shape
        weight_NK = add(graph, aten.permute.default, weight_KN, [1, 0])
        weight_TnK = add(graph, aten.reshape.default, weight_NK, [self.threads, N // self.threads, K])
        weight_TKn = add(graph, aten.permute.default, weight_TnK, [0, 2, 1])
        y_TBn = add(graph, aten.bmm.default, add(graph, aten.expand.default, x_BK, [self.threads, B, K]), weight_TKn)
        y_BN = add(graph, aten.reshape.default, add(graph, aten.permute.default, y_TBn, [1, 0, 2]), [B, N])
        return add(graph, aten.add.Tensor, y_BN, bias_N)


def _multiplications(left_MK: Node, right_KN: Node) -> int:
    return value(left_MK).shape[0] * value(right_KN).numel()


def _is_on_cpu(node: Any) -> bool:
    return value(node).device.type == "cpu"


def _product(graph: Graph, left_MK: Node, right_KN: Node) -> Node:
    right_NK = add(graph, aten.permute.default, right_KN, [1, 0])
    return add(graph, torch.ops.mnist_dist.product.default, left_MK, right_NK)


def _loop(graph: Graph, left_MK: Node, right_KN: Node) -> Node:
    left_MK1 = add(graph, aten.unsqueeze.default, left_MK, 2)
    right_1KN = add(graph, aten.unsqueeze.default, right_KN, 0)
    return add(graph, aten.sum.dim_IntList, add(graph, aten.mul.Tensor, left_MK1, right_1KN), [1])


def _times_reciprocal(graph: Graph, x: Node, number: Node) -> Node:
    return add(graph, aten.mul.Tensor, x, add(graph, aten.reciprocal.default, number))


def _replace(node: Node, make: Callable[..., Node]) -> None:
    with node.graph.inserting_before(node):
        node.replace_all_uses_with(make(node.graph, *node.args))
    node.graph.erase_node(node)
