"""A pass of inductor's over the graph of a step: matrix products are shared out to the threads as Adam's loops are.

Adam's loop over a weight gives each thread a block of its rows, which stay in the cache of that thread's core. MKL
shares the weight's products out in other ways, or not at all. So at small batches the weight and its gradient move from
core to core in each step, which takes longer than the products (docs/performance.md). Hence, for a large weight on the
CPU, its gradient and the activations from it become one product for each thread's block of rows.

From one sample they become loops of inductor's own. Its gradient leaves nothing to add up, so that Adam's loop computes
it, and it does not go through memory: on a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

# Weights of so many elements are large. For more samples than this MKL's own way is as fast.
LARGE_WEIGHT, MOST_SAMPLES = 100_000, 512


def value(node: Any) -> Tensor:
    """What stands for the node's tensor: its shape, type and device."""
    return node.meta["val"]


def add(graph: Graph, operation: Any, *inputs: Any) -> Node:
    """A new node."""
    node = graph.call_function(operation, inputs)
    node.meta["val"] = operation(*map_arg(inputs, value))
    return node


class ProductsWhereAdamIs(CustomGraphPass):
    """The pass, for as many threads as there are when it is made."""

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()

    def __call__(self, graph: Graph) -> None:
        """Replace products of the graph."""
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            rows, samples = value(node.args[0]).shape
            if samples == 1:
                node.target = aten.mul.Tensor
            elif self._cuts(value(node), rows, samples):
                _replace(node, self._gradient)
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            samples, rows = value(node).shape
            if (samples == 1 and value(node).device.type == "cpu") or self._cuts(value(node.args[2]), rows, samples):
                _replace(node, self._activations)

    def uuid(self) -> bytes:
        """Compiled code is kept under this, among others."""
        return get_hash_for_files((__file__,), str(self.threads))

    def _cuts(self, weight: Tensor, rows: int, samples: int) -> bool:
        return (weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64) and self.threads > 1
                and rows % self.threads == 0 and weight.numel() >= LARGE_WEIGHT and samples <= MOST_SAMPLES)

    def _gradient(self, graph: Graph, left_NB: Node, right_BK: Node) -> Node:
        """[N, K], from T threads' blocks of n = N / T rows."""
        (N, B), K = value(left_NB).shape, value(right_BK).shape[1]
        left_TnB = add(graph, aten.reshape.default, left_NB, [self.threads, N // self.threads, B])
        right_TBK = add(graph, aten.expand.default, right_BK, [self.threads, B, K])
        return add(graph, aten.reshape.default, add(graph, aten.bmm.default, left_TnB, right_TBK), [N, K])

    def _activations(self, graph: Graph, bias_N: Node, x_BK: Node, weight_KN: Node) -> Node:
        """[B, N], from T threads' blocks of n = N / T columns, which are rows of the weight as it is kept."""
        B, (K, N) = value(x_BK).shape[0], value(weight_KN).shape
        weight_NK = add(graph, aten.permute.default, weight_KN, [1, 0])
        if B == 1:
            y_N = add(graph, aten.sum.dim_IntList, add(graph, aten.mul.Tensor, weight_NK, x_BK), [1])
            return add(graph, aten.unsqueeze.default, add(graph, aten.add.Tensor, y_N, bias_N), 0)
        weight_TnK = add(graph, aten.reshape.default, weight_NK, [self.threads, N // self.threads, K])
        weight_TKn = add(graph, aten.permute.default, weight_TnK, [0, 2, 1])
        y_TBn = add(graph, aten.bmm.default, add(graph, aten.expand.default, x_BK, [self.threads, B, K]), weight_TKn)
        y_BN = add(graph, aten.reshape.default, add(graph, aten.permute.default, y_TBn, [1, 0, 2]), [B, N])
        return add(graph, aten.add.Tensor, y_BN, bias_N)


def _replace(node: Node, make: Callable[..., Node]) -> None:
    with node.graph.inserting_before(node):
        node.replace_all_uses_with(make(node.graph, *node.args))
    node.graph.erase_node(node)
